"""Textures of synthetic scalps, generated once per process: relief, vessels, noise, flakes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.spatial import cKDTree

Array = np.ndarray

WIDTH, HEIGHT = 640, 480
_TILE = (800, 1024)
_BANK_SEED = 20201013
STAMP_SIZES = (5, 7, 9, 12, 15, 19, 24, 30, 38, 46)
STAMPS_EACH = 20


@dataclass(frozen=True)
class Stamp:
    alpha: Array  # float32 (n, n), 0..1
    light: Array  # float32 (n, n), brightness around 1


@dataclass(frozen=True)
class _Bank:
    """Textures from which images are cut; float32 (800, 1024) tiles."""

    relief: Array
    grain: Array
    mottle: Array
    vessels: Array
    noise: Array
    flakes: tuple[tuple[Stamp, ...], ...]  # by size, then variant
    scurf: tuple[Stamp, ...]
    dots: tuple[Stamp, ...]


@lru_cache(maxsize=1)
def texture_bank() -> _Bank:
    """Generate the textures; cached per process."""
    rng = np.random.default_rng(_BANK_SEED)
    grain = _unit(0.5 * _noise(rng, 0.9) + 0.8 * _noise(rng, 2.2) + 0.6 * _noise(rng, 5))
    mottle = _unit(_coarse_noise(rng, 24) + 1.3 * _coarse_noise(rng, 60))
    return _Bank(
        relief=_relief(rng),
        grain=grain,
        mottle=mottle,
        vessels=_vessels(rng),
        noise=rng.standard_normal(_TILE, dtype=np.float32),
        flakes=tuple(tuple(_flake(size, rng) for _ in range(STAMPS_EACH)) for size in STAMP_SIZES),
        scurf=tuple(_scurf(int(size), rng) for size in rng.integers(26, 60, STAMPS_EACH)),
        dots=tuple(_dot(rng) for _ in range(16)),
    )


def _unit(values: Array) -> Array:
    return ((values - values.mean()) / values.std()).astype(np.float32)


def _noise(rng: np.random.Generator, sigma: float, shape: tuple[int, int] = _TILE) -> Array:
    return _unit(ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma))


def _coarse_noise(rng: np.random.Generator, sigma: float) -> Array:
    small = _noise(rng, sigma / 8, (_TILE[0] // 8, _TILE[1] // 8))
    return np.asarray(Image.fromarray(small).resize(_TILE[::-1], Image.Resampling.BICUBIC))


def _relief(rng: np.random.Generator) -> Array:
    """Fine furrows between skin polygons: the borders of a random Voronoi mosaic."""
    height, width = _TILE[0] // 2, _TILE[1] // 2
    seeds = rng.uniform((-10, -10), (height + 10, width + 10), (height * width // 70, 2))
    warp = np.stack([_noise(rng, 4, (height, width)), _noise(rng, 4, (height, width))], -1) * 1.6
    grid = np.moveaxis(np.mgrid[:height, :width], 0, -1) + warp
    near = cKDTree(seeds).query(grid.reshape(-1, 2), k=2)[0].astype(np.float32)
    gap = (near[:, 1] - near[:, 0]).reshape(height, width)
    cells = ndimage.gaussian_filter(1 - np.exp(-gap / 1.3), 0.7)
    return _unit(np.asarray(Image.fromarray(cells).resize(_TILE[::-1], Image.Resampling.BICUBIC)))


def _vessels(rng: np.random.Generator) -> Array:
    """Branching capillaries, 0..1."""
    image = Image.new("L", _TILE[::-1])
    draw = ImageDraw.Draw(image)
    for _ in range(46):
        _branch(draw, rng.uniform((0, 0), _TILE[::-1]), rng.uniform(0, 2 * np.pi), rng.uniform(2, 4), rng)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1.4)), dtype=np.float32) / 255


def _branch(
    draw: ImageDraw.ImageDraw, start: Array, angle: float, width: float, rng: np.random.Generator
) -> None:
    point = start
    for _ in range(rng.integers(5, 12)):
        angle += rng.normal(0, 0.35)
        end = point + rng.uniform(8, 16) * np.array([np.cos(angle), np.sin(angle)])
        draw.line([tuple(point), tuple(end)], fill=int(90 + 40 * width), width=max(1, round(width)))
        point = end
        if width > 1.4 and rng.random() < 0.22:
            _branch(draw, point, angle + rng.choice((-0.8, 0.8)), width * 0.6, rng)


def _flake(size: int, rng: np.random.Generator) -> Stamp:
    """One flake: ragged outline, thin and frayed inside, one raised and bright edge."""
    side = int(size * 1.5) + 5
    mask = _ragged(side, size / 2, rng)
    if rng.random() < 0.35:  # some have straight cracks
        mask *= _jagged(side, size / 1.7, rng)
    depth = ndimage.distance_transform_edt(mask > 0.5).astype(np.float32)
    fray = _noise(rng, max(0.9, size / 10), (side, side)) + 0.5 * _noise(rng, 0.8, (side, side))
    rim = np.exp(-depth / (0.9 + size / 30)) * (mask > 0.25)
    across = _slope(side, rng.uniform(0, 2 * np.pi))
    body = np.clip(rng.uniform(0.54, 0.84) + 0.15 * fray, 0.2, 0.98)
    alpha = mask * np.clip(body + 0.4 * rim * across, 0, 1)
    light = 0.96 + 0.035 * fray + 0.13 * rim * (across - 0.35)
    return Stamp(alpha.astype(np.float32), light.astype(np.float32))


def _ragged(side: int, radius: float, rng: np.random.Generator) -> Array:
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - (side - 1) / 2
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.55, 1.0)
    along = (columns * np.cos(turn) + rows * np.sin(turn)) * squeeze
    reach = np.hypot(along, columns * np.sin(turn) - rows * np.cos(turn)) / radius
    shape = (side, side)
    rough = 0.24 * _noise(rng, max(1.0, radius / 2.2), shape) + 0.14 * _noise(
        rng, max(0.8, radius / 6), shape
    )
    return 1 / (1 + np.exp(np.clip((reach - 0.85 - rough) * (1.1 * radius + 2), -30, 30)))


def _slope(side: int, angle: float) -> Array:
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return np.clip(0.5 + 0.6 * (rows * np.sin(angle) + columns * np.cos(angle)), 0, 1)


def _jagged(side: int, radius: float, rng: np.random.Generator) -> Array:
    corners = rng.integers(6, 12)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * 4 * rng.uniform(0.62, 1.12, corners)
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.5, 1.0)
    x, y = reach * np.cos(angles), squeeze * reach * np.sin(angles)
    points = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], -1)
    image = Image.new("L", (side * 4, side * 4))
    ImageDraw.Draw(image).polygon([tuple(p) for p in points + side * 2], fill=255)
    return np.asarray(image.reduce(4), dtype=np.float32) / 255


def _scurf(side: int, rng: np.random.Generator) -> Stamp:
    """A patch of powdery scale: crumbs of 2 to 5 pixels, sparser outwards."""
    alpha = np.zeros((side, side), np.float32)
    for _ in range(side * side // 45):
        size = int(rng.integers(2, 6))
        row, column = np.clip(rng.normal(side / 2, side / 5.5, 2), 0, side - size - 6).astype(int)
        crumb = _jagged(size + 5, size / 2 + 0.4, rng) * rng.uniform(0.3, 0.85)
        view = alpha[row : row + size + 5, column : column + size + 5]
        np.maximum(view, crumb[: view.shape[0], : view.shape[1]], out=view)
    return Stamp(alpha, np.full((side, side), 0.97, np.float32))


def _dot(rng: np.random.Generator) -> Stamp:
    """A lamp reflected in a drop of sweat or sebum: small, round and saturated."""
    rows, columns = np.mgrid[-5:6, -5:6].astype(np.float32)
    stretch, radius = rng.uniform(0.7, 1.3), rng.uniform(0.7, 2.2)
    reach = np.hypot(rows * stretch, columns / stretch)
    alpha = 1 / (1 + np.exp((reach - radius) * 3))
    return Stamp(alpha, np.ones_like(alpha))


def cut(tile: Array, rng: np.random.Generator) -> Array:
    """Cut a frame from a random place of a tile, with random mirroring."""
    row, column = rng.integers(0, _TILE[0] - HEIGHT), rng.integers(0, _TILE[1] - WIDTH)
    flip = [slice(None, None, int(sign)) for sign in rng.choice((-1, 1), 2)]
    return tile[row : row + HEIGHT, column : column + WIDTH][flip[0], flip[1]]
