"""Draw the other five symptoms on a scalp: erythema, pustules, dandruff, excess sebum and hair loss.

Each has something that no microscope's color or exposure imitates, because a camera with automatic white
balance hides what is the same in the whole frame: red patches next to pale skin, red rings with a pale head,
large yellowish scales, reflections in a film and in drops, and few and thin hairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from scalp_core.synthetic.layers import Layer, lay_flakes
from scalp_core.synthetic.profiles import OtherSeverities, Scalp
from scalp_core.synthetic.textures import (
    HEIGHT,
    WIDTH,
    Array,
    Stamp,
    cut,
    draw_flake,
    smooth_noise,
    texture_bank,
)

_BANK_SEED = 20201130
_SCALE_SIZES = (36, 46, 58, 72)
_SCALES_EACH = 8
_DANDRUFF = np.array((0.97, 0.90, 0.70))
_SEBUM = np.array((1.0, 0.97, 0.86), np.float32)
_PUS = np.array((0.97, 0.90, 0.62))
_RED = np.array((0.12, 1.0, 0.85), np.float32)  # absorption of R, G, B by blood

# Values at the severities -0.5 to 3.5, in steps of a half; symptoms start between good and mild.
_SEVERITIES = np.arange(-0.5, 4, 0.5)
_RED_SHARES = (0, 0, 0.05, 0.12, 0.2, 0.3, 0.4, 0.5, 0.58)
_RED_DEPTHS = (0, 0, 0.1, 0.18, 0.22, 0.27, 0.31, 0.36, 0.4)
_PUSTULES = (0, 0, 0.6, 2, 3.5, 5.5, 8, 12, 15)
_DANDRUFF_SHARES = (0, 0, 0.008, 0.022, 0.045, 0.075, 0.115, 0.17, 0.23)
_OILY_SHARES = (0, 0, 0.04, 0.1, 0.17, 0.26, 0.36, 0.48, 0.58)
_DROPS = (0, 0, 5, 14, 28, 46, 70, 105, 140)
_HAIRS = (1.05, 1, 0.86, 0.7, 0.56, 0.43, 0.32, 0.21, 0.14)
_HAIR_WIDTHS = (1.02, 1, 0.95, 0.88, 0.81, 0.73, 0.65, 0.56, 0.5)


def _at(severity: float, values: tuple[float, ...]) -> float:
    return float(np.interp(severity, _SEVERITIES, values))


@dataclass(frozen=True)
class _Bank:
    """Textures of the symptoms; float32 (800, 1024) tiles."""

    patches: Array
    capillaries: Array
    scales: tuple[tuple[Stamp, ...], ...]  # by size, then variant
    drops: tuple[Stamp, ...]


@lru_cache(maxsize=1)
def _bank() -> _Bank:
    """Generate the textures; cached per process, and only where the symptoms are drawn."""
    rng = np.random.default_rng(_BANK_SEED)
    lines = smooth_noise(rng, 9) + 0.35 * smooth_noise(rng, 3)
    return _Bank(
        patches=smooth_noise(rng, 30) + 0.25 * smooth_noise(rng, 8),
        capillaries=np.clip(1.15 - 4 * np.abs(lines), 0, 1),
        scales=tuple(tuple(_scale(size, rng) for _ in range(_SCALES_EACH)) for size in _SCALE_SIZES),
        drops=tuple(_drop(radius) for radius in (2.5, 3.5, 5, 7)),
    )


def _scale(size: int, rng: np.random.Generator) -> Stamp:
    """A large flake, without the straight edges of one that reaches the border of its stamp."""
    flake = draw_flake(size, rng)
    side = len(flake.alpha)
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - (side - 1) / 2
    inside = np.clip((side / 2 - np.hypot(rows, columns)) / 3, 0, 1)
    return Stamp((flake.alpha * inside).astype(np.float32), flake.light)


def _drop(radius: float) -> Stamp:
    """A drop of sebum: a dim body and a bright reflection of the lamps near its edge."""
    side = int(2 * radius) + 7
    rows, columns = np.mgrid[:side, :side].astype(np.float32) - (side - 1) / 2
    body = 1 / (1 + np.exp(2 * (np.hypot(rows, columns) - radius)))
    gleam = np.exp(-((rows + 0.3 * radius) ** 2 + (columns + 0.3 * radius) ** 2) / (0.22 * radius**2 + 0.5))
    return Stamp(np.clip(0.3 * body + 0.9 * gleam, 0, 1), np.ones((side, side), np.float32))


def thin_hair(scalp: Scalp, others: OtherSeverities) -> Scalp:
    """Hair of the severity of hair loss; the redness and sebum of a healthy person, which are drawn apart."""
    return replace(
        scalp,
        redness=0.2 * scalp.redness,
        sebum=0.2 * scalp.sebum,
        hairs=scalp.hairs * _at(others.hair_loss, _HAIRS),
        hair_width=scalp.hair_width * _at(others.hair_loss, _HAIR_WIDTHS),
    )


def draw_on_skin(planes: Array, others: OtherSeverities, scale: float, rng: np.random.Generator) -> None:
    """Draw what is below flakes and hairs, erythema and pustules, on planes, float32 (3, 480, 640), in place.

    Args:
        planes: R, G, B of the scene.
        others: Severities.
        scale: Pixels per pixel at a magnification of 1.
        rng: Random generator. The same state gives the same places at each severity.
    """
    erythema_rng, pustules_rng = rng.spawn(2)
    _redden(planes, others.erythema_between_follicles, erythema_rng)
    _lay_pustules(planes, others.follicular_pustules, scale, pustules_rng)


def draw_on_hairs(
    planes: Array, others: OtherSeverities, scale: float, light_angle: float, rng: np.random.Generator
) -> None:
    """Draw what lies on hairs too, dandruff and sebum; arguments as `draw_on_skin`."""
    dandruff_rng, sebum_rng = rng.spawn(2)
    lay_flakes(planes, _scatter_scales(others.dandruff, scale, dandruff_rng), _DANDRUFF, light_angle)
    _oil(planes, others.excess_sebum, sebum_rng)


def _patches(share: float, rng: np.random.Generator) -> Array:
    """Soft patches that cover a share of the frame; float32 (480, 640), 0..1."""
    field = cut(_bank().patches, rng)
    limit = np.float32(np.quantile(field[::4, ::4], 1 - share))
    return np.clip((field - limit) / np.float32(0.7), 0, 1)


def _redden(planes: Array, severity: float, rng: np.random.Generator) -> None:
    """Redden patches between follicles, with widened capillaries in them."""
    patches = _patches(_at(severity, _RED_SHARES), rng)
    capillaries = cut(_bank().capillaries, rng)
    depth = np.float32(_at(severity, _RED_DEPTHS))
    red = depth * patches * (np.float32(0.75) + np.float32(0.75) * capillaries)
    planes *= 1 - _RED[:, None, None] * red


def _lay_pustules(planes: Array, severity: float, scale: float, rng: np.random.Generator) -> None:
    """Draw pustules: a red ring that fades into the skin, and a pale dome with the light of a lamp."""
    places = rng.uniform((30, 30), (WIDTH - 30, HEIGHT - 30), (20, 2)).astype(int)
    sizes = scale * rng.uniform(10, 15, 20)
    for (x, y), size in list(zip(places, sizes, strict=True))[: round(_at(severity, _PUSTULES))]:
        reach = int(5 * size)
        left, top = max(x - reach, 0), max(y - reach, 0)
        window = planes[:, top : y + reach, left : x + reach]
        rows, columns = np.mgrid[: window.shape[1], : window.shape[2]].astype(np.float32)
        rows, columns = rows - (y - top), columns - (x - left)
        far = np.hypot(rows, columns)
        ring = np.exp(-((far / (2.2 * size)) ** 2))
        window *= 1 - _RED[:, None, None] * np.float32(0.5) * ring
        dome = 0.85 / (1 + np.exp(np.clip(1.2 * (far - size), -30, 30)))
        gleam = np.exp(-((rows + 0.4 * size) ** 2 + (columns + 0.4 * size) ** 2) / (0.1 * size**2))
        window += dome * ((0.9 + 0.15 * gleam) * _PUS[:, None, None] - window)


def _scatter_scales(severity: float, scale: float, rng: np.random.Generator) -> Layer:
    """Add large scales, on hairs and skin, until the cover of the severity is reached."""
    wanted = _at(severity, _DANDRUFF_SHARES) * WIDTH * HEIGHT
    layer = Layer()
    while wanted > 0:
        size = scale * rng.lognormal(np.log(44), 0.25)
        stamps = _bank().scales[np.searchsorted(_SCALE_SIZES[:-1], size)]
        place = rng.uniform((0, 0), (WIDTH, HEIGHT))
        cover = layer.add(stamps[rng.integers(_SCALES_EACH)], place, rng.uniform(0.9, 1.0))
        wanted -= max(cover, 20)  # a minimum, so that the loop ends
    return layer


def _oil(planes: Array, severity: float, rng: np.random.Generator) -> None:
    """Draw a film that glistens on the relief of the skin, and drops of sebum."""
    film = _patches(_at(severity, _OILY_SHARES), rng)
    glint = np.clip(cut(texture_bank().relief, rng) - np.float32(0.6), 0, 1.2)
    layer = Layer()
    for _ in range(round(_at(severity, _DROPS))):
        drop = _bank().drops[rng.integers(len(_bank().drops))]
        layer.add(drop, rng.uniform((0, 0), (WIDTH, HEIGHT)), rng.uniform(0.7, 1.0))
    wet = film * (np.float32(0.1) + np.float32(0.55) * glint)
    alpha = np.maximum(layer.alpha, np.minimum(wet, 0.85))
    planes += alpha * (_SEBUM[:, None, None] - np.minimum(planes, 1))
