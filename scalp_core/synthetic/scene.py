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

_MARGIN = 140  # hairs rooted outside the frame cross it too
_BALANCE = np.array((1.13, 0.97, 0.90))  # mean R, G, B of a scalp after white balance, relative to gray
_SPREAD = 0.34  # target of auto-levels: standard deviation of a channel relative to its mean
# Positions of the outline along a hair, from root to tip; denser at the root, which is tapered.
_ALONG = np.array((0, 0.006, 0.014, 0.03, 0.07, 0.15, 0.25, 0.36, 0.48, 0.6, 0.73, 0.86, 1.0))
_BATCH = 128
# Share of skin under flakes at each severity (grade units); from mild on it grows by two to four per grade.
_SEVERITIES = np.arange(-0.5, 4, 0.5)
_COVERAGES = (0.0004, 0.0015, 0.013, 0.034, 0.075, 0.135, 0.215, 0.33, 0.43)


@dataclass(frozen=True)
class DeviceProfile:
    """Optical properties of one microscope at one site."""

    site: str = "0013"
    serial: str = "A2LEBJJDE00060O"
    gains: tuple[float, float, float] = (1.0, 1.0, 1.0)  # color cast: R, G, B relative to neutral
    exposure: float = 0.55  # target mean of auto-exposure, 0..1
    contrast: float = 1.0  # target spread of auto-levels, relative to the usual
    vignette: float = 0.35  # loss of light in the corners, 0..1
    light_center: tuple[float, float] = (0.5, 0.5)  # center of the ring of lamps, shares of width and height
    light_angle: float = 0.8  # direction of shadows, radians
    lighting: float = 1.0  # spread of light, glare and exposure between images
    specular: float = 1.0  # brightness of reflected lamps
    blur: float = 0.8  # sigma of the lens, pixels
    noise: float = 0.008  # standard deviation of the sensor noise, 0..1
    quality: int = 82  # JPEG
    subsampling: int = 2  # 0: 4:4:4, 2: 4:2:0
    magnification: float = 1.0


@dataclass(frozen=True)
class Scalp:
    """Skin and hair of one person's scalp, without its flaking."""

    skin: tuple[float, float, float] = (0.70, 0.54, 0.46)
    redness: float = 0.4  # 0..1
    sebum: float = 0.4  # 0..1
    hairs: float = 11.0  # mean number of hair roots in the frame
    hair_width: float = 8.5  # pixels
    hair_shade: float = 0.13  # 0 black .. 1 white
    hair_tint: tuple[float, float, float] = (1.0, 0.86, 0.76)
    gray_share: float = 0.03


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
    follicles, hairs = _grow(scalp, scale, hair_rng)
    planes = _skin(scalp, follicles, scale, skin_rng)
    on_skin, on_hair = _scatter(severity, scale, follicles, hairs, flake_rng)
    _lay_flakes(planes, on_skin, scalp, device.light_angle)
    _lay_hairs(planes, hairs, scalp, device, hair_rng)
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


# --- hair --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hair:
    line: Array  # float (13, 2) points x, y from root to tip
    width: Array  # float (13,) pixels
    shade: float


def _grow(scalp: Scalp, scale: float, rng: np.random.Generator) -> tuple[Array, list[_Hair]]:
    """Place follicles on a jittered grid, each with one to three hairs along the parting."""
    hairs_each = np.array([0.45, 0.42, 0.13])
    units = scalp.hairs / scale**2 / float(hairs_each @ np.array([1, 2, 3]))
    spacing = float(np.sqrt(WIDTH * HEIGHT / max(units, 0.5)))
    columns, rows = np.meshgrid(
        np.arange(-_MARGIN, WIDTH + _MARGIN, spacing), np.arange(-_MARGIN, HEIGHT + _MARGIN, spacing)
    )
    columns[::2] += spacing / 2
    follicles = np.stack([columns.ravel(), rows.ravel()], -1) + rng.uniform(0, spacing, 2)
    follicles += rng.normal(0, spacing * 0.24, follicles.shape)
    parting, spread, sweep = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.3), rng.normal(0, 0.25)
    hairs = []
    for root in follicles:
        lean = parting + rng.normal(0, spread) + (rng.normal(0, 0.9) if rng.random() < 0.08 else 0)
        for _ in range(rng.choice(3, p=hairs_each) + 1):
            start = root + rng.normal(0, 2.5 * scale, 2)
            hairs.append(_hair(start, lean + rng.normal(0, 0.11), sweep, scalp, scale, rng))
    return follicles, hairs


def _hair(
    root: Array, lean: float, sweep: float, scalp: Scalp, scale: float, rng: np.random.Generator
) -> _Hair:
    fine = rng.random() < 0.1  # vellus hairs: short and thin
    length = scale * (rng.uniform(60, 200) if fine else rng.uniform(420, 1000))
    t = _ALONG
    bend = sweep + rng.normal(0, 0.2)
    angles = lean + bend * (t - 0.3) + 0.08 * np.sin(t * rng.uniform(3, 7) + rng.uniform(0, 6))
    steps = np.stack([np.cos(angles), np.sin(angles)], -1) * (length * np.diff(t, prepend=0))[:, None]
    line = root + np.cumsum(steps, 0)
    thick = scalp.hair_width * scale * (0.4 if fine else rng.normal(1, 0.14))
    taper = np.minimum(1, 0.3 + 1.2 * np.sqrt(t * length / thick / 3)) * (
        np.minimum(1, (1.04 - t) * 2) if fine or rng.random() < 0.6 else 1
    )
    gray = rng.random() < scalp.gray_share
    shade = rng.uniform(0.5, 0.72) if gray else scalp.hair_shade * rng.uniform(0.75, 1.3)
    return _Hair(line, np.maximum(thick * taper, 1.2), shade)


def _ribbon(hair: _Hair, low: float, high: float) -> list[tuple[float, float]]:
    """Outline of a hair between two shares of its half width, at twice the frame's size."""
    along = np.gradient(hair.line, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], -1) / np.hypot(*along.T)[:, None]
    across *= hair.width[:, None]
    sides = np.concatenate([hair.line + across * low / 2, (hair.line + across * high / 2)[::-1]]) * 2
    return list(map(tuple, sides.tolist()))


def _draw_hairs(hairs: list[_Hair], side: float) -> Image.Image:
    """Draw hairs as an RGB image of shade, gloss and mask; antialiased by drawing at twice the size."""
    image = Image.new("RGB", (WIDTH * 2, HEIGHT * 2), (40, 0, 0))
    draw = ImageDraw.Draw(image)
    for hair in hairs:
        if _outside(hair):
            continue
        edge, core = int(hair.shade * 150), int(hair.shade * 255)
        draw.polygon(_ribbon(hair, -1, 1), fill=(edge, 0, 255))
        draw.polygon(_ribbon(hair, -0.66, 0.66), fill=(core, 0, 255))
        draw.polygon(_ribbon(hair, side * 0.32 - 0.17, side * 0.32 + 0.17), fill=(core, 255, 255))
    return image.reduce(2)


def _outside(hair: _Hair) -> bool:
    low, high = hair.line.min(0), hair.line.max(0)
    return bool(high[0] < -8 or high[1] < -8 or low[0] > WIDTH + 8 or low[1] > HEIGHT + 8)


def _lay_hairs(
    planes: list[Array], hairs: list[_Hair], scalp: Scalp, device: DeviceProfile, rng: np.random.Generator
) -> None:
    near = int(rng.random() < 0.35) * int(rng.integers(1, 4))  # upright hairs, out of focus
    order = rng.permutation(len(hairs))
    for chosen, soft, drop in ((order[near:], 0.0, 5), (order[:near], 2.6, 14)):
        if len(chosen):
            image = _draw_hairs([hairs[i] for i in chosen], float(rng.choice((-1, 1))))
            if soft:
                image = image.filter(ImageFilter.BoxBlur(soft))
            _blend_hairs(planes, image, drop * device.magnification, scalp, device, rng)


def _blend_hairs(
    planes: list[Array],
    image: Image.Image,
    drop: float,
    scalp: Scalp,
    device: DeviceProfile,
    rng: np.random.Generator,
) -> None:
    shade, gloss, mask = (np.asarray(band, dtype=np.float32) / 255 for band in image.split())
    shadow = _soft_shadow(image.getchannel(2), drop, device.light_angle)
    patchy = np.clip(cut(texture_bank().mottle, rng) * 0.6 + 0.35, 0, 1.3)
    gloss *= patchy * np.float32(device.specular * rng.uniform(0.22, 0.5))
    for plane, tint in zip(planes, scalp.hair_tint, strict=True):
        plane *= 1 - np.float32(0.42) * shadow
        hair = shade * np.float32(tint) + gloss
        plane += mask * (hair - plane)


def _soft_shadow(mask: Image.Image, drop: float, angle: float) -> Array:
    """Shadow of an object `drop` pixels above the skin; float32 (480, 640), 0..1."""
    small = mask.reduce(4).filter(ImageFilter.GaussianBlur(max(0.7, drop / 6)))
    dx, dy = drop * np.cos(angle) / 4, drop * np.sin(angle) / 4
    moved = small.transform(
        small.size, Image.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy), Image.Resampling.BILINEAR
    )
    return np.asarray(moved.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32) / 255


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
    severity: float, scale: float, follicles: Array, hairs: list[_Hair], rng: np.random.Generator
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
    hairs: list[_Hair],
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
