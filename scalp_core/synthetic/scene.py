"""Render one scalp as seen by a handheld microscope: skin, follicles, flakes, hairs, light, camera.

The image is rendered back to front as three float planes (R, G, B in 0..1): skin with relief and vessels,
flakes on the skin, hairs with their shadow, flakes on hairs, the ring of lamps, and a camera with automatic
exposure and white balance. Only the flakes depend on the severity, so that nothing else reveals the grade.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from scalp_core.synthetic.hair import Hair, grow_hairs, lay_hairs
from scalp_core.synthetic.profiles import DeviceProfile, Scalp
from scalp_core.synthetic.textures import (
    HEIGHT,
    STAMP_SIZES,
    STAMPS_EACH,
    WIDTH,
    Array,
    Stamp,
    cut,
    texture_bank,
)

_BALANCE = np.array((1.13, 0.97, 0.90))  # mean R, G, B of a scalp after white balance, relative to gray
_SPREAD = 0.34  # target of auto-levels: standard deviation of a channel relative to its mean
_BATCH = 128
# Share of skin under flakes at each severity (grade units); from mild on it grows by two to four per grade.
_SEVERITIES = np.arange(-0.5, 4, 0.5)
_COVERAGES = (0.0004, 0.0015, 0.013, 0.034, 0.075, 0.135, 0.215, 0.33, 0.43)


def flake_coverage(severity: float) -> float:
    """Share of skin under flakes (opacity-weighted, 0..1) at a severity in grade units."""
    return float(np.exp(np.interp(severity, _SEVERITIES, np.log(_COVERAGES))))


def render_image(
    severity: float, device: DeviceProfile, rng: np.random.Generator, scalp: Scalp | None = None
) -> Array:
    """Render one image of a scalp.

    Args:
        severity: Amount of flaking in grade units: 0 good, 1 mild, 2 moderate, 3 severe, and between.
        device: Optical properties of the microscope.
        rng: Random generator of this image. The same state gives the same scene at each severity, with more
            or less flaking.
        scalp: Skin and hair of the person.

    Returns:
        uint8 (480, 640, 3), RGB.
    """
    scalp = scalp or Scalp()
    skin_rng, hair_rng, flake_rng, light_rng, camera_rng = rng.spawn(5)
    scale = device.magnification * skin_rng.uniform(0.93, 1.07)
    follicles, hairs = grow_hairs(scalp, scale, hair_rng)
    planes = _skin(scalp, follicles, scale, skin_rng)
    on_skin, on_hair = _scatter(severity, scale, follicles, hairs, flake_rng)
    _lay_flakes(planes, on_skin, scalp, device.light_angle)
    lay_hairs(planes, hairs, scalp, device, hair_rng)
    _lay_flakes(planes, on_hair, scalp, device.light_angle)
    _shine(planes, scalp, device, light_rng)
    return _photograph(planes, device, camera_rng)


# --- skin --------------------------------------------------------------------------------------------------


def _skin(scalp: Scalp, follicles: Array, scale: float, rng: np.random.Generator) -> list[Array]:
    textures = texture_bank()
    light = cut(textures.relief, rng) * np.float32(rng.uniform(0.01, 0.032))
    light += cut(textures.grain, rng) * np.float32(rng.uniform(0.012, 0.03))
    light += cut(textures.mottle, rng) * np.float32(0.035)
    light += 1
    redness = cut(textures.mottle, rng) * np.float32(0.3) + 1
    redness *= np.float32(0.22 * scalp.redness)
    redness += cut(textures.vessels, rng) * np.float32(rng.uniform(0.05, 0.32) * (0.25 + scalp.redness))
    pits = _pits(follicles, scale, rng)
    light -= pits * np.float32(0.3)
    green = light * (1 - np.clip(redness, 0, 0.6))
    tone = np.array(scalp.skin) * rng.normal(1, 0.02, 3)
    return [
        light * np.float32(tone[0]),
        green * np.float32(tone[1]),
        (0.3 * light + 0.7 * green) * np.float32(tone[2]) * (1 - pits * np.float32(0.12)),
    ]


def _pits(follicles: Array, scale: float, rng: np.random.Generator) -> Array:
    """Draw shadows of follicle openings and of pores without a hair; 0..1."""
    image = Image.new("L", (WIDTH // 2, HEIGHT // 2))
    draw = ImageDraw.Draw(image)
    pores = rng.uniform((0, 0), (WIDTH, HEIGHT), (rng.poisson(26), 2))
    for points, low, high, depth in ((pores, 1.2, 3.2, 130), (follicles, 6.0, 10.0, 240)):
        for x, y in points / 2:
            rx, ry = rng.uniform(low, high, 2) * scale * 0.6
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(depth * rng.uniform(0.5, 1)))
    soft = image.filter(ImageFilter.GaussianBlur(1.5)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    return np.asarray(soft, dtype=np.float32) / 255


# --- flakes ------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """Layer of overlapping stamps."""

    alpha: Array  # float32 (480, 640)
    light: Array  # float32 (480, 640), premultiplied by alpha

    @classmethod
    def empty(cls) -> _Layer:
        return cls(*np.zeros((2, HEIGHT, WIDTH), np.float32))

    def add(self, stamp: Stamp, x: float, y: float, opacity: float, turn: int) -> float:
        """Add a stamp centered at x, y; returns the increase of the cover, in pixels."""
        alpha, light = stamp.alpha, stamp.light
        if turn & 1:
            alpha, light = alpha[::-1], light[::-1]
        if turn & 2:
            alpha, light = alpha.T, light.T
        side = alpha.shape[0]
        left, top = int(x) - side // 2, int(y) - side // 2
        rows = slice(max(top, 0), min(top + side, HEIGHT))
        columns = slice(max(left, 0), min(left + side, WIDTH))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return 0.0
        inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        alpha = alpha[inner] * np.float32(opacity)
        under = self.alpha[rows, columns]
        grown = alpha * (1 - under)
        shine = self.light[rows, columns]
        shine += alpha * (light[inner] - shine)
        under += grown
        return float(grown.sum())


def _scatter(
    severity: float, scale: float, follicles: Array, hairs: list[Hair], rng: np.random.Generator
) -> tuple[_Layer, _Layer]:
    """Add flakes on the skin and on hairs until the cover of the severity is reached."""
    wanted = flake_coverage(severity) * rng.lognormal(0, 0.08) * WIDTH * HEIGHT
    growth = float(np.clip(severity, 0, 3.5))
    inside = follicles[np.all((follicles > 0) & (follicles < (WIDTH, HEIGHT)), axis=1)]
    centers, spread = rng.uniform((0, 0), (WIDTH, HEIGHT), (rng.integers(2, 6), 2)), rng.uniform(35, 80)
    thin = rng.uniform(0.82, 1.0)  # opacity of scale differs between people
    on_skin, on_hair = _Layer.empty(), _Layer.empty()
    while wanted > 0:
        places, clings = _places(growth, inside, hairs, centers, spread, rng)
        opacities = thin * rng.uniform(0.7, 1.0, _BATCH)
        turns = rng.integers(4, size=_BATCH).tolist()
        stamps = _pick(growth, scale, rng)
        for stamp, (x, y), clinging, opacity, turn in zip(
            stamps, places.tolist(), clings.tolist(), opacities.tolist(), turns, strict=True
        ):
            cover = (on_hair if clinging else on_skin).add(stamp, x, y, opacity, turn)
            wanted -= max(cover / thin, 0.5)  # a minimum, so that the loop ends
            if wanted <= 0:
                break
    return on_skin, on_hair


def _pick(growth: float, scale: float, rng: np.random.Generator) -> list[Stamp]:
    """Pick a batch of stamps: plates that grow with severity, and patches of powder."""
    textures = texture_bank()
    sizes = scale * rng.lognormal(np.log(9 + 3.5 * growth), 0.42, _BATCH)
    rows = np.searchsorted(STAMP_SIZES[:-1], sizes).tolist()
    variants = rng.integers(STAMPS_EACH, size=_BATCH).tolist()
    powder = (rng.random(_BATCH) < 0.06 + 0.04 * growth).tolist()
    return [
        textures.scurf[variant] if fine else textures.flakes[row][variant]
        for row, variant, fine in zip(rows, variants, powder, strict=True)
    ]


def _places(
    growth: float,
    follicles: Array,
    hairs: list[Hair],
    centers: Array,
    spread: float,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Draw positions of a batch of flakes, float (N, 2) x and y, and whether each is on a hair, bool (N,).

    Positions are uniform, around follicles, in clusters (more with severity), and on hairs.
    """
    kind = rng.random(_BATCH)
    places = rng.uniform((0, 0), (WIDTH, HEIGHT), (_BATCH, 2))
    clings = (kind < 0.1) & bool(hairs)
    around = (kind >= 0.1) & (kind < 0.32) & bool(len(follicles))
    clustered = kind > 1 - min(0.18 * growth, 0.45)
    if hairs:
        points = np.concatenate([hair.line[3:] for hair in hairs])
        places[clings] = points[rng.integers(len(points), size=clings.sum())]
    if len(follicles):
        places[around] = follicles[rng.integers(len(follicles), size=around.sum())]
    places[clustered] = centers[rng.integers(len(centers), size=clustered.sum())]
    reach = np.select([clings, around, clustered], [5, 15, spread], 0)[:, None]
    return places + reach * rng.standard_normal((_BATCH, 2)), clings


def _lay_flakes(planes: list[Array], layer: _Layer, scalp: Scalp, light_angle: float) -> None:
    if not layer.alpha.any():
        return
    dx, dy = round(2 * np.cos(light_angle)), round(2 * np.sin(light_angle))
    shadow = np.zeros_like(layer.alpha)
    shadow[2:-2, 2:-2] = layer.alpha[2 - dy : HEIGHT - 2 - dy, 2 - dx : WIDTH - 2 - dx]
    shadow *= (1 - layer.alpha) * np.float32(0.28)
    horn = 0.8 * np.array((0.97, 0.955, 0.93)) + 0.2 * np.array(scalp.skin)
    for plane, color in zip(planes, horn, strict=True):
        plane *= 1 - shadow
        plane *= 1 - layer.alpha
        plane += layer.light * np.float32(color)


# --- light and camera --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _grid() -> tuple[Array, Array]:
    """Rows and columns as shares of the frame, float32, for broadcasting."""
    rows = np.linspace(0, 1, HEIGHT, dtype=np.float32)[:, None]
    return rows, np.linspace(0, 1, WIDTH, dtype=np.float32)[None, :]


def _shine(planes: list[Array], scalp: Scalp, device: DeviceProfile, rng: np.random.Generator) -> None:
    rows, columns = _grid()
    x, y = np.array(device.light_center) + rng.normal(0, 0.06 * device.lighting, 2)
    far = (columns - np.float32(x)) ** 2 + (rows - np.float32(y)) ** 2
    light = 1 - np.float32(device.vignette * rng.uniform(0.7, 1.3)) * far * 1.6
    lean = rng.normal(0, 0.07 * device.lighting, 2).astype(np.float32)
    light += lean[0] * (columns - 0.5) + lean[1] * (rows - 0.5)
    np.clip(light, 0.12, None, out=light)
    mirrored = _reflections(scalp, device, rng)
    for plane in planes:
        plane *= light
        plane += mirrored * (1 - np.clip(plane, 0, 1))


def _reflections(scalp: Scalp, device: DeviceProfile, rng: np.random.Generator) -> Array:
    """Draw reflections: lamps in moist skin, a film of sebum, and sometimes a patch of glare; 0..1."""
    textures = texture_bank()
    strength = device.specular * device.lighting
    film = np.clip(cut(textures.grain, rng) * 0.5 + cut(textures.mottle, rng) * 0.6 - 0.9, 0, 1.5)
    film *= np.float32(strength * rng.uniform(0.05, 0.3) * (0.2 + scalp.sebum))
    layer = _Layer(film, np.zeros_like(film))
    patches = rng.uniform((0, 0), (WIDTH, HEIGHT), (rng.integers(2, 7), 2))
    for _ in range(rng.poisson(38 * strength * rng.uniform(0.2, 1.6) * (0.3 + scalp.sebum))):
        x, y = patches[rng.integers(len(patches))] + rng.normal(0, 70, 2)
        layer.add(textures.dots[rng.integers(len(textures.dots))], x, y, rng.uniform(0.4, 1), 0)
    if rng.random() < 0.35:
        rows, columns = _grid()
        x, y, reach = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.006, 0.03)
        across = np.exp(-((columns - np.float32(x)) ** 2) / np.float32(reach))
        layer.alpha += (
            across
            * np.exp(-((rows - np.float32(y)) ** 2) / np.float32(reach))
            * np.float32(0.3 * strength * rng.random())
        )
    return layer.alpha


def _photograph(planes: list[Array], device: DeviceProfile, rng: np.random.Generator) -> Array:
    """Apply the camera: exposure, white balance, levels, color cast, lens and sensor noise.

    Cheap microscopes normalize mean and spread of each channel; here this also prevents the mean color from
    revealing the amount of white flakes.
    """
    target = device.exposure * (1 + rng.normal(0, 0.07 * device.lighting)) * np.array(device.gains) * _BALANCE
    target = target * rng.normal(1, 0.025 * device.lighting, 3)
    spread = _SPREAD * device.contrast * target * rng.normal(1, 0.06 * device.lighting, 3)
    spread *= 1 + rng.normal(0, 0.1 * device.lighting)
    balance, levels = rng.uniform(0.8, 1.0), rng.uniform(0.75, 1.0)
    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for channel, plane in enumerate(planes):
        curve = _curve(plane[::3, ::3], target[channel], spread[channel], balance, levels)
        plane *= np.float32(len(curve) / 2)
        image[..., channel] = curve[np.clip(plane, 0, len(curve) - 1).astype(np.uint16)]
    sigma = device.blur * rng.lognormal(0, 0.25)
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1.3 * sigma)), dtype=np.int16)
    tile = texture_bank().noise
    strength = np.float32(device.noise * 255 * rng.lognormal(0, 0.3))
    grain = (cut(tile, rng) * strength).astype(np.int16)
    return np.clip(soft + grain[..., None], 0, 255).astype(np.uint8)


def _curve(sample: Array, target: float, spread: float, balance: float, levels: float) -> Array:
    """Tone curve of one channel, a power law for 0..2 that keeps black hair black; uint8 (4096,)."""
    mean = float(sample.mean())
    steep = float(np.clip((spread * mean / (target * sample.std())) ** levels, 0.7, 1.35))
    gain = mean ** (1 - balance) * target**balance / float(((np.maximum(sample, 0) / mean) ** steep).mean())
    tone = (np.arange(4096) / (2048 * mean)) ** steep * gain
    tone -= 0.4 * np.maximum(tone - 0.75, 0)  # soft roll-off of highlights
    return (np.clip(tone, 0, 1) * 255).astype(np.uint8)
