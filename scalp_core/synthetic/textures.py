"""Textures of synthetic scalps, generated once per process: skin, vessels, noise, flakes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

Array = np.ndarray

WIDTH, HEIGHT = 640, 480
_TILE = (800, 1024)
_BANK_SEED = 20201013
STAMP_SIZES = (5, 7, 9, 12, 15, 19, 24, 30, 38, 46)
STAMPS_EACH = 20


@dataclass(frozen=True)
class Stamp:
    """A flake or a reflection, which is laid on an image."""

    alpha: Array  # float32 (n, n), 0..1
    light: Array  # float32 (n, n), brightness around 1


@dataclass(frozen=True)
class _Bank:
    """Textures from which images are cut; float32 (800, 1024) tiles."""

    relief: Array
    mottle: Array
    vessels: Array
    noise: Array
    flakes: tuple[tuple[Stamp, ...], ...]  # by size, then variant
    dot: Stamp


@lru_cache(maxsize=1)
def texture_bank() -> _Bank:
    """Generate the textures; cached per process."""
    rng = np.random.default_rng(_BANK_SEED)
    return _Bank(
        # The zeros of a smooth noise are connected lines: furrows between skin polygons, and capillaries.
        relief=_unit(
            0.7 * np.abs(smooth_noise(rng, 1.8)) + 0.5 * smooth_noise(rng, 0.9) + 0.5 * smooth_noise(rng, 4)
        ),
        mottle=_unit(smooth_noise(rng, 24) + 1.3 * smooth_noise(rng, 60)),
        vessels=np.clip(1 - 5 * np.abs(smooth_noise(rng, 12)), 0, 1),
        noise=rng.standard_normal(_TILE, dtype=np.float32),
        flakes=tuple(tuple(draw_flake(size, rng) for _ in range(STAMPS_EACH)) for size in STAMP_SIZES),
        dot=Stamp(_disk(11, 1.5), np.ones((11, 11), np.float32)),
    )


def _unit(values: Array) -> Array:
    return ((values - values.mean()) / values.std()).astype(np.float32)


def smooth_noise(rng: np.random.Generator, sigma: float, shape: tuple[int, int] = _TILE) -> Array:
    """Gaussian noise of a standard deviation of 1, smoothed by `sigma` pixels; float32."""
    return _unit(ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma))


def _disk(side: int, radius: float) -> Array:
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - (side - 1) / 2
    return 1 / (1 + np.exp((np.hypot(rows, columns) - radius) * 3))


def draw_flake(size: int, rng: np.random.Generator) -> Stamp:
    """One flake: ragged outline, thin and frayed inside, one raised and bright edge."""
    side = int(size * 1.5) + 5
    mask = _ragged(side, size / 2, rng)
    depth = ndimage.distance_transform_edt(mask > 0.5).astype(np.float32)
    fray = smooth_noise(rng, max(0.9, size / 10), (side, side)) + 0.5 * smooth_noise(rng, 0.8, (side, side))
    rim = np.exp(-depth / (0.9 + size / 30)) * (mask > 0.25)
    across = _slope(side, rng.uniform(0, 2 * np.pi))
    body = np.clip(rng.uniform(0.54, 0.84) + 0.15 * fray, 0.2, 0.98)
    alpha = mask * np.clip(body + 0.4 * rim * across, 0, 1)
    light = 0.96 + 0.035 * fray + 0.13 * rim * (across - 0.35)
    return Stamp(alpha.astype(np.float32), light.astype(np.float32))


def _ragged(side: int, radius: float, rng: np.random.Generator) -> Array:
    """Ellipse with a rough outline, 0..1."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - (side - 1) / 2
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.55, 1.0)
    along = (columns * np.cos(turn) + rows * np.sin(turn)) * squeeze
    reach = np.hypot(along, columns * np.sin(turn) - rows * np.cos(turn)) / radius
    rough = 0.24 * smooth_noise(rng, max(1.0, radius / 2.2), (side, side))
    rough += 0.14 * smooth_noise(rng, max(0.8, radius / 6), (side, side))
    return 1 / (1 + np.exp(np.clip((reach - 0.85 - rough) * (1.1 * radius + 2), -30, 30)))


def _slope(side: int, angle: float) -> Array:
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return np.clip(0.5 + 0.6 * (rows * np.sin(angle) + columns * np.cos(angle)), 0, 1)


def cut(tile: Array, rng: np.random.Generator) -> Array:
    """Cut a frame from a random place of a tile, with random mirroring."""
    row, column = rng.integers(0, _TILE[0] - HEIGHT), rng.integers(0, _TILE[1] - WIDTH)
    flip = [slice(None, None, int(sign)) for sign in rng.choice((-1, 1), 2)]
    return tile[row : row + HEIGHT, column : column + WIDTH][flip[0], flip[1]]
