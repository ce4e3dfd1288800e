"""Out-of-distribution images by kind, and blurred images of scalps."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_sample_images

SIZE = (640, 480)
_WORDS = "the patient reports itching since march and uses a new shampoo twice a week".split()  # noqa: SIM905


def text(rng: np.random.Generator) -> Image.Image:
    """Draw a page of letters, near or far, on white or yellowed paper."""
    paper = tuple(int(value) for value in rng.integers(200, 256, 3))
    picture = Image.new("RGB", SIZE, paper)
    draw, size = ImageDraw.Draw(picture), int(rng.integers(12, 48))
    font = ImageFont.load_default(size)
    ink = int(rng.integers(0, 90))
    for top in range(int(rng.integers(0, 30)), SIZE[1], int(size * 1.4)):
        draw.text((int(rng.integers(5, 40)), top), " ".join(rng.choice(_WORDS, 20)), (ink,) * 3, font)
    return _by_camera(picture, rng) if rng.random() < 0.5 else picture


def screenshot(rng: np.random.Generator) -> Image.Image:
    """Windows, buttons and lines of text on plain colors."""
    picture = Image.new("RGB", SIZE, tuple(int(value) for value in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 16))):
        left, top = int(rng.integers(0, 560)), int(rng.integers(0, 420))
        right, bottom = left + int(rng.integers(40, 400)), top + int(rng.integers(20, 250))
        draw.rectangle(
            (left, top, right, bottom), tuple(int(value) for value in rng.integers(0, 256, 3)), "gray"
        )
        draw.text((left + 5, top + 5), " ".join(rng.choice(_WORDS, 6)), "black", ImageFont.load_default(14))
    return picture


def uniform_noise(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8))


def gaussian_noise(rng: np.random.Generator) -> Image.Image:
    """Around the color of skin, as a sensor without light that is turned up."""
    noise = rng.normal(_skin_color(rng), rng.uniform(15, 60), (SIZE[1], SIZE[0], 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def plain_skin(rng: np.random.Generator) -> Image.Image:
    """Skin without a hair: a gradient of light over pores and blotches."""
    height, width = SIZE[1], SIZE[0]
    y, x = np.mgrid[:height, :width] / height - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.3) * (x * np.cos(angle) + y * np.sin(angle))
    for grain, depth in ((4, 0.03), (16, 0.03), (80, 0.05)):
        coarse = Image.fromarray(rng.normal(size=(height // grain, width // grain)).astype(np.float32))
        blotch = np.array(coarse.resize(SIZE, Image.Resampling.BICUBIC))
        light += rng.uniform(0.3, 1) * depth * blotch / blotch.std()
    pixels = light[..., None] * _skin_color(rng) + rng.normal(0, 2, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _skin_color(rng: np.random.Generator) -> np.ndarray:
    return np.array([200, 150, 125]) * rng.uniform(0.7, 1.15) + rng.normal(0, 8, 3)


def black(rng: np.random.Generator) -> Image.Image:
    """A cap on the lens."""
    return _by_camera(Image.new("RGB", SIZE), rng)


def white(rng: np.random.Generator) -> Image.Image:
    """A lamp, or paper."""
    return _by_camera(Image.new("RGB", SIZE, (int(rng.integers(245, 256)),) * 3), rng)


@cache
def _scenes() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]  # a temple and a flower


def natural(rng: np.random.Generator) -> Image.Image:
    """Crop an ordinary photograph."""
    scene = _scenes()[int(rng.integers(2))]
    width = int(rng.integers(200, 640))
    height = width * 2 // 3
    left, top = int(rng.integers(0, 641 - width)), int(rng.integers(0, 428 - height))
    return scene.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)


KINDS = {
    "text": text,
    "screenshot": screenshot,
    "uniform noise": uniform_noise,
    "gaussian noise": gaussian_noise,
    "plain skin": plain_skin,
    "black": black,
    "white": white,
    "natural image": natural,
}
"""Functions that make an image of each kind; `blurred` takes an image."""


def blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur an image of a scalp, so that no hair has an edge."""
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(6, 16))))


def _by_camera(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With a sensor's noise and a lens' softness."""
    pixels = np.array(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2)))), float)
    pixels += rng.normal(0, rng.uniform(1, 4), pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_file(picture: Image.Image) -> bytes:
    """Encode an image as JPEG."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()
