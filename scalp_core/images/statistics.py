"""Image statistics for gates and drift: sharpness, light, color, texture.

`measure` runs on every decoded image before grading.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

STATISTICS_VERSION: Literal[2] = 2
"""Incremented when `measure` changes, because gates fit only the version that they were fitted on."""

STATISTICS = (
    "luma_mean",  # 0..1
    "luma_std",  # log
    "luma_skew",
    "coarse_std",  # log of the standard deviation of green between blocks of 16x16 pixels
    "dark_share",  # share of pixels below 16
    "bright_share",  # share of pixels above 239
    "flat_share",  # share of pixels whose neighbors differ by at most one level, as in drawings
    "sharpness_1",  # log of the mean absolute Laplacian of green, at full size,
    "sharpness_2",  # halved,
    "sharpness_4",  # and quartered
    "peakedness_2",  # log of the Laplacian's mean square by the square of its mean: few edges or many
    "peakedness_4",
    "coherence",  # degree to which edges share one direction
    "axis_share",  # degree to which edges are parallel to the sides, as in text and windows
    "red_green",  # log of the ratio of the means
    "blue_green",
    "red_green_std",  # log
    "blue_yellow_std",  # log
    "saturation",  # 1 less the mean of the weakest channel by that of the strongest
)
"""Names of the statistics that `measure` returns, in this order."""

_DARK, _BRIGHT = 16, 239
_SAMPLE = 45  # pixels per side of the sample for light and colors; more do not change them
_SCALES = (1, 4, 16)  # pixels per sum at full, half and quarter size
_LEVELS = np.arange(256.0)
_OF_LEVELS = np.stack([_LEVELS, _LEVELS**2, _LEVELS**3, _LEVELS < _DARK, _LEVELS > _BRIGHT])


def measure(pixels: np.ndarray) -> np.ndarray:
    """Measure the statistics of one decoded image.

    Light and colors are measured on a grid of pixels, edges on the green channel, which has the finest
    detail. The overhead of a NumPy call exceeds its arithmetic and limits threads, hence few calls on
    contiguous arrays. Sums are integers, so that equal bytes give equal statistics on each processor.

    Args:
        pixels: uint8 (size, size, 3), RGB, from `preprocess.decode`.

    Returns:
        float32 (K,), in the order of `STATISTICS`.
    """
    sample = _sampled(pixels)
    mean, spread, skew, dark, bright = _light(sample)
    one = _blocks(pixels[..., 1])
    two = _blocks(_added(one))
    quarter = _added(two)
    four = _blocks(quarter)
    eight = _blocks(_added(four))
    edges = [_laplacian(blocks) for blocks in (one, two, four)]
    return np.array(
        [
            mean,
            spread,
            skew,
            _coarse(eight),
            dark,
            bright,
            _flat_share(one),
            *[_sharpness(edge, scale) for edge, scale in zip(edges, _SCALES, strict=True)],
            *[_peakedness(edge, scale) for edge, scale in zip(edges[1:], _SCALES[1:], strict=True)],
            *_directions(quarter),
            *_colors(sample),
        ],
        np.float32,
    )


def measure_all(images: np.ndarray) -> np.ndarray:
    """Measure images uint8 (N, size, size, 3); returns float32 (N, K)."""
    return np.array([measure(image) for image in images], np.float32).reshape(len(images), len(STATISTICS))


def _sampled(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a grid over the square, int32 (3, n), with an odd step, against periodic patterns."""
    step = len(pixels) // _SAMPLE | 1
    return pixels[::step, ::step].transpose(2, 0, 1).astype(np.int32, order="C").reshape(3, -1)


def _light(sample: np.ndarray) -> tuple[float, float, float, float, float]:
    """Mean, log of the standard deviation, skew, dark share and bright share of the luminance."""
    red, green, blue = sample
    counts = np.bincount((2 * red + 5 * green + blue) >> 3, minlength=256)
    mean, second, third, dark, bright = (np.dot(_OF_LEVELS, counts) / red.size).tolist()
    variance = max(second - mean**2, 0.0)
    skew = (third - 3 * mean * second + 2 * mean**3) / (variance + 1) ** 1.5
    return mean / 255, math.log(variance**0.5 + 1), skew, dark, bright


def _colors(sample: np.ndarray) -> list[float]:
    red, green, blue = sample
    count = red.size
    reds, greens, blues = np.add.reduce(sample, axis=1, dtype=np.int32).tolist()
    low, high = _sum(np.minimum.reduce(sample)), _sum(np.maximum.reduce(sample))
    return [
        math.log((reds + count) / (greens + count)),
        math.log((blues + count) / (greens + count)),
        math.log(_spread(red - green, reds - greens) + 1),
        math.log(_spread(red + green - 2 * blue, reds + greens - 2 * blues) / 2 + 1),
        1 - (low + count) / (high + count),
    ]


def _blocks(plane: np.ndarray) -> np.ndarray:
    """The four pixels of each 2x2 block, int16 (4, H // 2, W // 2), without an odd last row or column."""
    height, width = plane.shape[0] // 2, plane.shape[1] // 2
    blocks = plane[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
    return blocks.transpose(1, 3, 0, 2).astype(np.int16, order="C").reshape(4, height, width)


def _added(blocks: np.ndarray) -> np.ndarray:
    """Sums of blocks, the next plane; int16 is sufficient up to blocks of 8x8."""
    return np.add.reduce(blocks, axis=0, dtype=np.int16)


def _laplacian(blocks: np.ndarray) -> np.ndarray:
    """Absolute Laplacian at the last pixel of each block, without the margin."""
    width = blocks.shape[2]
    _, above, left, here = blocks.reshape(4, -1)  # flat arrays: fewer and longer steps are faster
    line = 4 * here
    line -= above
    line -= left
    line[:-width] -= above[width:]
    line[:-1] -= left[1:]
    return np.abs(line.reshape(blocks.shape[1:])[:-1, :-1])


def _sharpness(edge: np.ndarray, scale: int) -> float:
    return math.log(_sum(edge) / (edge.size * scale) + 0.1)


def _peakedness(edge: np.ndarray, scale: int) -> float:
    mean, square = _sum(edge) / (edge.size * scale), _squares(edge) / (edge.size * scale**2)
    return math.log((square + 1) / (mean**2 + 1))


def _flat_share(blocks: np.ndarray) -> float:
    steps = np.abs(blocks[1:3] - blocks[0])  # one pixel per block is sufficient
    return np.count_nonzero(steps[0] + steps[1] <= 1) / steps[0].size


def _coarse(blocks: np.ndarray) -> float:
    """Log of the standard deviation between blocks of 16 pixels, from sums of 8x8."""
    sums = np.add.reduce(blocks, axis=0, dtype=np.int32)
    return math.log(_spread(sums, _sum(sums)) / 256 + 1)


def _directions(plane: np.ndarray) -> tuple[float, float]:
    across = (plane[:-1, 1:] - plane[:-1, :-1]).astype(np.float64).ravel()
    down = (plane[1:, :-1] - plane[:-1, :-1]).astype(np.float64).ravel()
    xx, yy = _product(across, across), _product(down, down)
    xy, both = _product(across, down), _product(np.abs(across), np.abs(down))
    # A noise term per pixel, so that a blank square has no direction.
    total = xx + yy + _SCALES[2] ** 2 * across.size
    return ((xx - yy) ** 2 + 4 * xy**2) ** 0.5 / total, 1 - 2 * both / total


def _spread(values: np.ndarray, total: int) -> float:
    """Standard deviation of integers whose sum is `total`."""
    return max(_squares(values) / values.size - (total / values.size) ** 2, 0.0) ** 0.5


def _sum(values: np.ndarray) -> int:
    return int(np.add.reduce(values, axis=None, dtype=np.int32))


def _squares(values: np.ndarray) -> float:
    exact = values.ravel().astype(np.float64)
    return _product(exact, exact)


def _product(left: np.ndarray, right: np.ndarray) -> float:
    """Inner product of integers in float64: sums below 2**53 are exact in any order."""
    if left.size > 8192:
        return float(np.einsum("i,i->", left, right))  # BLAS would start threads next to those that decode
    return float(np.dot(left, right))
