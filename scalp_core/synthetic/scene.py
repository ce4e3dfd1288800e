"""Render one scalp as seen by a handheld microscope: skin, flakes, hairs, light, camera.

The image is rendered back to front as float planes (R, G, B in 0..1): skin with relief and vessels, flakes,
hairs with their shadow, the ring of lamps, and a camera with automatic exposure and white balance. Only the
flakes depend on the severity of micro-keratin, so that nothing else reveals its grade.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from scalp_core.synthetic import symptoms
from scalp_core.synthetic.layers import Layer, lay_flakes
from scalp_core.synthetic.profiles import DeviceProfile, OtherSeverities, Scalp
from scalp_core.synthetic.textures import (
    HEIGHT,
    STAMP_SIZES,
    STAMPS_EACH,
    WIDTH,
    Array,
    cut,
    texture_bank,
)

_BALANCE = np.array((1.13, 0.97, 0.90))  # mean R, G, B of a scalp after white balance, relative to gray
_SPREAD = 0.34  # target of auto-levels: standard deviation of a channel relative to its mean
# Share of skin under flakes at each severity (grade units); from mild on it grows by two to four per grade.
_SEVERITIES = np.arange(-0.5, 4, 0.5)
_COVERAGES = (0.0004, 0.0015, 0.013, 0.034, 0.075, 0.135, 0.215, 0.33, 0.43)
_HORN = np.array((0.97, 0.955, 0.93))  # color of flakes
_MARGIN = 140  # hairs rooted outside the frame cross it too


def flake_coverage(severity: float) -> float:
    """Share of skin under flakes (opacity-weighted, 0..1) at a severity in grade units."""
    return float(np.exp(np.interp(severity, _SEVERITIES, np.log(_COVERAGES))))


def render_image(
    severity: float,
    device: DeviceProfile,
    rng: np.random.Generator,
    scalp: Scalp | None = None,
    others: OtherSeverities | None = None,
) -> Array:
    """Render one image of a scalp.

    Args:
        severity: Amount of flaking in grade units: 0 good, 1 mild, 2 moderate, 3 severe, and between.
        device: Optical properties of the microscope.
        rng: Random generator of this image. The same state gives the same scene at each severity, with more
            or less flaking.
        scalp: Skin and hair of the person.
        others: Severities of the other symptoms; None: they are not drawn, and redness, sebum and hairs are
            those of the scalp.

    Returns:
        uint8 (480, 640, 3), RGB.
    """
    scalp = scalp or Scalp()
    skin_rng, hair_rng, flake_rng, light_rng, camera_rng = rng.spawn(5)
    below_rng, above_rng = rng.spawn(2)
    if others:
        scalp = symptoms.thin_hair(scalp, others)
    planes = _skin(scalp, skin_rng)
    scale = device.magnification * skin_rng.uniform(0.93, 1.07)
    if others:
        symptoms.draw_on_skin(planes, others, scale, below_rng)
    horn = 0.8 * _HORN + 0.2 * np.array(scalp.skin)
    lay_flakes(planes, _scatter(severity, scale, flake_rng), horn, device.light_angle)
    _lay_hairs(planes, scalp, scale, device.light_angle, hair_rng)
    if others:
        symptoms.draw_on_hairs(planes, others, scale, device.light_angle, above_rng)
    _shine(planes, scalp, device, light_rng)
    return _photograph(planes, device, camera_rng)


def _skin(scalp: Scalp, rng: np.random.Generator) -> Array:
    textures = texture_bank()
    light = 1 + rng.uniform(0.03, 0.05) * cut(textures.relief, rng) + 0.035 * cut(textures.mottle, rng)
    redness = 0.22 * scalp.redness * (1 + 0.3 * cut(textures.mottle, rng))
    redness += rng.uniform(0.05, 0.32) * (0.25 + scalp.redness) * cut(textures.vessels, rng)
    green = light * (1 - np.clip(redness, 0, 0.6))
    tone = np.array(scalp.skin) * rng.normal(1, 0.02, 3)
    return (np.stack([light, green, 0.3 * light + 0.7 * green]) * tone[:, None, None]).astype(np.float32)


def _scatter(severity: float, scale: float, rng: np.random.Generator) -> Layer:
    """Add flakes, uniformly and in clusters, until the cover of the severity is reached."""
    flakes = texture_bank().flakes
    wanted = flake_coverage(severity) * rng.lognormal(0, 0.08) * WIDTH * HEIGHT
    growth = float(np.clip(severity, 0, 3.5))  # larger and more clustered flakes
    centers, spread = rng.uniform((0, 0), (WIDTH, HEIGHT), (rng.integers(2, 6), 2)), rng.uniform(35, 80)
    thin = rng.uniform(0.82, 1.0)  # opacity of scale differs between people
    layer = Layer()
    while wanted > 0:
        place = rng.uniform((0, 0), (WIDTH, HEIGHT))
        if rng.random() < min(0.18 * growth, 0.45):
            place = centers[rng.integers(len(centers))] + spread * rng.standard_normal(2)
        size = scale * rng.lognormal(np.log(9 + 3.5 * growth), 0.42)
        stamp = flakes[np.searchsorted(STAMP_SIZES[:-1], size)][rng.integers(STAMPS_EACH)]
        cover = layer.add(stamp, place, thin * rng.uniform(0.7, 1.0))
        wanted -= max(cover / thin, 0.5)  # a minimum, so that the loop ends
    return layer


def _lay_hairs(
    planes: Array, scalp: Scalp, scale: float, light_angle: float, rng: np.random.Generator
) -> None:
    """Draw bent hairs along a parting, with gloss and shadow; antialiased by drawing at twice the size."""
    size = np.array((WIDTH, HEIGHT))
    number = rng.poisson(scalp.hairs / scale**2 * np.prod(1 + 2 * _MARGIN / size))
    parting, spread, gloss = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.3), rng.uniform(0.1, 0.4)
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT))  # shade, gloss and mask
    draw = ImageDraw.Draw(image)
    for _ in range(number):
        bend = rng.normal(0, 0.3) * np.linspace(-0.3, 0.7, 12)
        angles = parting + rng.normal(0, spread) + bend
        steps = np.stack([np.cos(angles), np.sin(angles)], 1) * scale * rng.uniform(30, 85)
        line = 2 * (rng.uniform(-_MARGIN, size + _MARGIN) + np.cumsum(steps, 0))
        width = 2 * scalp.hair_width * scale * rng.uniform(0.4, 1.2)
        shade = int(255 * scalp.hair_shade * rng.uniform(0.75, 1.3))
        for share, shine in ((1, 0), (0.3, 255)):
            points = [tuple(point) for point in line]
            draw.line(points, (shade, shine, 255), max(1, round(share * width)), joint="curve")
    image = image.reduce(2)
    shade, shine, mask = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    planes *= 1 - np.float32(0.42) * _shadow(image.getchannel(2), 5 * scale, light_angle)
    tint = np.array(scalp.hair_tint, np.float32)[:, None, None]
    planes += mask * (shade * tint + np.float32(gloss) * shine - planes)


def _shadow(mask: Image.Image, drop: float, angle: float) -> Array:
    """Shadow of an object `drop` pixels above the skin; float32 (480, 640), 0..1."""
    move = (1, 0, -drop * np.cos(angle), 0, 1, -drop * np.sin(angle))
    moved = mask.transform(mask.size, Image.Transform.AFFINE, move, Image.Resampling.BILINEAR)
    return np.asarray(moved.filter(ImageFilter.BoxBlur(3)), np.float32) / 255


def _shine(planes: Array, scalp: Scalp, device: DeviceProfile, rng: np.random.Generator) -> None:
    """Light from the ring of lamps, and its reflections in moist skin and sebum."""
    rows = np.linspace(-0.5, 0.5, HEIGHT, dtype=np.float32)[:, None]
    columns = np.linspace(-0.5, 0.5, WIDTH, dtype=np.float32)
    x, y, lean_x, lean_y = rng.normal(0, 0.08 * device.lighting, 4).astype(np.float32)
    far = (columns - x) ** 2 + (rows - y) ** 2
    light = 1 - np.float32(device.vignette * rng.uniform(1.1, 2.1)) * far + lean_x * columns + lean_y * rows
    planes *= np.maximum(light, 0.12)
    textures, layer = texture_bank(), Layer()
    strength = device.lighting * rng.uniform(0.2, 1.6) * (0.3 + scalp.sebum)
    patches = rng.uniform((0, 0), (WIDTH, HEIGHT), (rng.integers(2, 7), 2))
    for _ in range(rng.poisson(30 * strength)):
        place = patches[rng.integers(len(patches))] + rng.normal(0, 70, 2)
        layer.add(textures.dot, place, rng.uniform(0.4, 1))
    film = np.clip(cut(textures.mottle, rng) - 0.8, 0, 1.5) * np.float32(0.15 * strength)
    planes += np.maximum(layer.alpha, film) * (1 - np.clip(planes, 0, 1))


def _photograph(planes: Array, device: DeviceProfile, rng: np.random.Generator) -> Array:
    """Apply the camera: exposure, white balance, levels, color cast, lens and sensor noise.

    Cheap microscopes normalize mean and spread of each channel; here this also prevents the mean color from
    revealing the amount of white flakes.
    """
    target = device.exposure * (1 + rng.normal(0, 0.07 * device.lighting)) * np.array(device.gains) * _BALANCE
    target = target * rng.normal(1, 0.025 * device.lighting, 3)
    spread = _SPREAD * target * rng.normal(1, 0.06 * device.lighting, 3)
    spread *= 1 + rng.normal(0, 0.1 * device.lighting)
    balance, levels = rng.uniform(0.8, 1.0), rng.uniform(0.75, 1.0)
    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for channel, plane in enumerate(planes):
        curve = _curve(plane[::3, ::3], target[channel], spread[channel], balance, levels)
        places = np.clip(plane * (len(curve) / 2), 0, len(curve) - 1)
        image[..., channel] = curve[places.astype(np.uint16)]
    blur = ImageFilter.BoxBlur(1.3 * device.blur * rng.lognormal(0, 0.15))
    soft = np.asarray(Image.fromarray(image).filter(blur), np.float32)
    grain = cut(texture_bank().noise, rng) * np.float32(device.noise * 255 * rng.lognormal(0, 0.2))
    return np.clip(soft + grain[..., None], 0, 255).astype(np.uint8)


def _curve(sample: Array, target: float, spread: float, balance: float, levels: float) -> Array:
    """Tone curve of one channel, a power law for 0..2 that keeps black hair black; uint8 (4096,)."""
    mean = float(sample.mean())
    steep = float(np.clip((spread * mean / (target * sample.std())) ** levels, 0.7, 1.35))
    gain = mean ** (1 - balance) * target**balance / float(((np.maximum(sample, 0) / mean) ** steep).mean())
    tone = (np.arange(4096) / (2048 * mean)) ** steep * gain
    tone -= 0.4 * np.maximum(tone - 0.75, 0)  # soft roll-off of highlights
    return (np.clip(tone, 0, 1) * 255).astype(np.uint8)
