"""Preprocess images from bytes to model input, the same in training, evaluation, bulk and online grading.

bytes -> decode() -> uint8 RGB square -> normalize() on the device -> float tensor
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.images.codecs import read_picture

Resize = Literal["squash", "crop", "pad"]
Triple = Annotated[tuple[float, float, float], "one number for each of R, G, B"]


class Preprocess(BaseModel):
    """Settings from image to tensor; they belong to the weights and are stored in the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(224, ge=32, le=1024, description="side of the square input, pixels")
    resize: Resize = Field(
        "squash",
        description="squash: both sides to `size`, as in the paper; crop: the center square; "
        "pad: the whole image in its aspect ratio, between bars of the mean color",
    )
    mean: Triple = Field((0.5, 0.5, 0.5), description="subtracted after scaling to 0..1")
    std: Triple = Field((0.5, 0.5, 0.5), description="divided by after that; 0.5/0.5 gives -1..1")

    def content_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the image in the square; for `crop`, those of the center square."""
        if self.resize != "pad":
            return self.size, self.size
        scale = self.size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))


class Decoded(NamedTuple):
    """A preprocessed image."""

    pixels: np.ndarray  # uint8 (size, size, 3), RGB, upright
    notes: tuple[str, ...]  # remarks on an image that was decoded; `first_frame_only` for an animated one


def decode(data: bytes, spec: Preprocess) -> Decoded:
    """Decode and resize one JPEG, PNG, WebP, BMP, TIFF or DICOM image, upright by its EXIF orientation.

    Raises:
        ImageError: see `codecs.read_picture`. Partial images are rejected.
    """
    picture = read_picture(data, spec.content_size)
    # Rotated after the resize, because the square is smaller than the image.
    return Decoded(upright(_fit(picture.pixels, spec), picture.orientation), picture.notes)


def _fit(pixels: np.ndarray, spec: Preprocess) -> np.ndarray:
    height, width = pixels.shape[:2]
    if spec.resize == "crop":
        side = min(width, height)
        box = CropBox((width - side) / 2, (height - side) / 2, side, side)
        return resize_pixels(pixels, spec.size, spec.size, box)
    content_width, content_height = spec.content_size(width, height)
    content = resize_pixels(pixels, content_width, content_height)
    if content.shape[:2] == (spec.size, spec.size):
        return content
    square = np.empty((spec.size, spec.size, 3), np.uint8)
    square[:] = [round(channel * 255) for channel in spec.mean]
    top, left = (spec.size - content_height) // 2, (spec.size - content_width) // 2
    square[top : top + content_height, left : left + content_width] = content
    return square


def resize_pixels(pixels: np.ndarray, width: int, height: int, box: CropBox | None = None) -> np.ndarray:
    """Resize uint8 (H, W, 3), or a box of it, with an antialiased bilinear filter in SIMD.

    It is within one level of Pillow's. Integer arithmetic gives the same bytes on each processor.
    """
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear))
    if box:
        options.crop_box = box
    source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
    result = ImageData(width, height, PixelType.U8x3)
    Resizer().resize(source, result, options)
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(height, width, 3)


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate an image (H, W, 3) upright by its EXIF orientation, 1 to 8; returns a copy."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.array(image, order="C")  # PyTorch needs writable arrays
