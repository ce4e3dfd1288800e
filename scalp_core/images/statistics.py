"""Image statistics for quality and out-of-distribution gates: sharpness, light, color, texture.

`measure` runs on every decoded image before grading. `fit_gates` runs once, at the end of training, and the
bundle stores its result; `flag_images` and `unlikeness` apply it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

STATISTICS_VERSION: Literal[2] = 2
"""Goes up whenever `measure` returns other numbers under the same names: old gates do not fit them."""

STATISTICS = (
    "luma_mean",  # 0..1
    "luma_std",  # log
    "luma_skew",
    "coarse_std",  # log of the deviation of green between blocks of 16x16 pixels
    "dark_share",  # of pixels below 16
    "bright_share",  # of pixels above 239
    "flat_share",  # of pixels whose neighbors differ by no more than one level: drawn, not photographed
    "sharpness_1",  # log of the mean absolute Laplacian of green, at full size,
    "sharpness_2",  # halved,
    "sharpness_4",  # and quartered
    "peakedness_2",  # log of the Laplacian's mean square by the square of its mean: few edges or many
    "peakedness_4",
    "coherence",  # how far edges share one direction
    "axis_share",  # how far edges lie along the sides of the picture, as letters and windows do
    "red_green",  # log of the ratio of the means
    "blue_green",
    "red_green_std",  # log
    "blue_yellow_std",  # log
    "saturation",  # 1 less the mean of the weakest channel by that of the strongest
)
"""What `measure` returns, in this order."""

_DARK, _BRIGHT = 16, 239
_SAMPLE = 45  # pixels a side, about, tell light and colors as well as all of them
_SCALES = (1, 4, 16)  # pixels that are added up at full, half and quarter size
_LEVELS = np.arange(256.0)
_OF_LEVELS = np.stack([_LEVELS, _LEVELS**2, _LEVELS**3, _LEVELS < _DARK, _LEVELS > _BRIGHT])

# Of the training part; `Profile.quantiles` holds the values at these shares.
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# The limit is this much beyond what all but one in a hundred known photographs keep: microscopes that nobody
# has seen yet differ more than those that were.
_SHARE, _MARGIN = 0.99, 1.25
# What never varied in training may vary a little elsewhere: the least scale of a statistic, in its own unit,
# and what is added to the variance of every combination of them, whose usual size is 1.
_MIN_SCALE, _MORE_VARIANCE = 0.02, 0.05
# Quality limits lie beyond the last of the training part by as much as that from its middle, or by this.
_LAST, _MIN_LUMA_MARGIN, _MIN_SHARPNESS_MARGIN = 0.005, 0.1, 0.5

BLURRED, TOO_DARK, TOO_BRIGHT, UNLIKE_TRAINING = "blurred", "too_dark", "too_bright", "unlike_training"


class Profile(BaseModel):
    """How one statistic was distributed over the training part: what later photographs drift from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    std: float
    quantiles: tuple[float, ...] = Field(description="at the shares 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99")


class Gates(BaseModel):
    """When a photograph is no photograph of the kind the model knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistics_version: Literal[2] = Field(description="of `measure`, when they were fitted")
    photographs: int = Field(description="of the training part that were measured")
    min_sharpness: float = Field(description="of `sharpness_1`; below it a photograph is blurred")
    min_luma: float = Field(description="of `luma_mean`; below it a photograph is too dark")
    max_luma: float = Field(description="of `luma_mean`; above it a photograph is too bright")
    limit: float = Field(gt=0, description="Mahalanobis distance above which it is unlike the training part")
    center: tuple[float, ...] = Field(description="median of each statistic")
    scale: tuple[float, ...] = Field(description="robust standard deviation of each statistic")
    precision: tuple[tuple[float, ...], ...] = Field(
        description="inverse covariance of the scaled statistics"
    )
    profile: dict[str, Profile] = Field(
        description="of each statistic, by name, in the order of all the above"
    )

    @model_validator(mode="after")
    def _are_of_these_statistics(self) -> Gates:
        if tuple(self.profile) != STATISTICS:
            raise ValueError("fitted on other statistics than this version of scalp measures")
        count = len(STATISTICS)
        if {len(self.center), len(self.scale), len(self.precision), *map(len, self.precision)} != {count}:
            raise ValueError(f"center, scale and precision must have {count} entries a side")
        return self


def measure(pixels: np.ndarray) -> np.ndarray:
    """The statistics of one decoded photograph.

    Light and colors are of a grid of pixels, edges of the green, in which sensors see finest. A step of
    NumPy costs more than its arithmetic, and threads hardly share them: so there are few, on arrays in one
    piece. Sums are of integers, so that equal bytes give equal statistics whatever adds them up.

    Args:
        pixels: uint8 (size, size, 3), RGB, from `preprocess.decode`.

    Returns:
        float32 (K,), as `STATISTICS` names them.
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
    """`measure` of uint8 (N, size, size, 3): float32 (N, K)."""
    return np.array([measure(image) for image in images], np.float32).reshape(len(images), len(STATISTICS))


def fit_gates(train: np.ndarray, val: np.ndarray) -> Gates:
    """The gates of a model, from the photographs it was trained and validated on.

    Args:
        train: statistics float (N, K) of training photographs.
        val: statistics float (M, K) of validation photographs, of other microscopes if they are kept apart.

    Raises:
        ValueError: one of them is empty.
    """
    from sklearn.covariance import LedoitWolf  # a second to import, and not for whoever only grades

    if not len(train) or not len(val):
        raise ValueError("gates need photographs of the training and of the validation part")
    train, val = (part[np.lexsort(part.T)].astype(np.float64) for part in (train, val))  # in one order always
    low, center, high = np.quantile(train, (0.25, 0.5, 0.75), axis=0)
    # The quartiles of a normal distribution are 1.349 deviations apart.
    scale = np.maximum(np.maximum((high - low) / 1.349, train.std(axis=0) / 2), _MIN_SCALE)
    covariance = LedoitWolf(assume_centered=True).fit((train - center) / scale).covariance_
    precision = np.linalg.inv(covariance + _MORE_VARIANCE * np.eye(len(scale)))
    usual = max(
        np.quantile(_distance(part, center, scale, precision), _SHARE, method="higher")
        for part in (train, val)
    )
    luma = train[:, STATISTICS.index("luma_mean")]
    sharpness = train[:, STATISTICS.index("sharpness_1")]
    return Gates(
        statistics_version=STATISTICS_VERSION,
        photographs=len(train),
        min_sharpness=_beyond(sharpness, _LAST, _MIN_SHARPNESS_MARGIN),
        min_luma=_beyond(luma, _LAST, _MIN_LUMA_MARGIN),
        max_luma=_beyond(luma, 1 - _LAST, _MIN_LUMA_MARGIN),
        limit=_MARGIN * float(usual),
        center=tuple(center.tolist()),
        scale=tuple(scale.tolist()),
        precision=tuple(map(tuple, precision.tolist())),
        profile={name: _profile(train[:, index]) for index, name in enumerate(STATISTICS)},
    )


def unlikeness(statistics: np.ndarray, gates: Gates) -> np.ndarray:
    """Distance from the training part by the limit, float64 (N,); above 1 is unlike it.

    Args:
        statistics: float (N, K).
        gates: of the bundle.
    """
    distance = _distance(statistics, *map(np.array, (gates.center, gates.scale, gates.precision)))
    # Rounded: a product of matrices may differ in its last bits from one number of rows to another.
    return np.round(distance / gates.limit, 6)


def flag_images(statistics: np.ndarray, gates: Gates) -> dict[str, np.ndarray]:
    """Which of the photographs, bool (N,), are blurred, too dark, too bright and unlike the training part.

    Args:
        statistics: float (N, K).
        gates: of the bundle.
    """
    luma = statistics[:, STATISTICS.index("luma_mean")]
    return {
        BLURRED: statistics[:, STATISTICS.index("sharpness_1")] < gates.min_sharpness,
        TOO_DARK: luma < gates.min_luma,
        TOO_BRIGHT: luma > gates.max_luma,
        UNLIKE_TRAINING: unlikeness(statistics, gates) > 1,
    }


def _distance(
    statistics: np.ndarray, center: np.ndarray, scale: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    scaled = (statistics.astype(np.float64) - center) / scale
    return np.sqrt(np.maximum(((scaled @ precision) * scaled).sum(axis=1), 0))


def _beyond(values: np.ndarray, share: float, margin: float) -> float:
    middle, last = np.quantile(values, (0.5, share))
    away = max(abs(last - middle), margin)
    return float(last + away if share > 0.5 else last - away)


def _profile(values: np.ndarray) -> Profile:
    quantiles = tuple(np.quantile(values, QUANTILES).tolist())
    return Profile(mean=float(values.mean()), std=float(values.std()), quantiles=quantiles)


def _sampled(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a grid over the square, int32 (3, n); at an odd step, which few patterns repeat at."""
    step = len(pixels) // _SAMPLE | 1
    return pixels[::step, ::step].transpose(2, 0, 1).astype(np.int32, order="C").reshape(3, -1)


def _light(sample: np.ndarray) -> tuple[float, float, float, float, float]:
    """Mean, log of the deviation, skew, dark share and bright share of the luminance."""
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
    """The four pixels of every 2x2, int16 (4, H // 2, W // 2); an odd last row or column is left out."""
    height, width = plane.shape[0] // 2, plane.shape[1] // 2
    blocks = plane[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
    return blocks.transpose(1, 3, 0, 2).astype(np.int16, order="C").reshape(4, height, width)


def _added(blocks: np.ndarray) -> np.ndarray:
    """Their sums, the next plane; int16 holds them up to blocks of 8x8."""
    return np.add.reduce(blocks, axis=0, dtype=np.int16)


def _laplacian(blocks: np.ndarray) -> np.ndarray:
    """Its absolute value at the last pixel of every block, which is enough, but not at the margin."""
    width = blocks.shape[2]
    _, above, left, here = blocks.reshape(4, -1)  # each as one line: long steps are faster than many
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
    steps = np.abs(blocks[1:3] - blocks[0])  # of one pixel of every block, which is enough
    return np.count_nonzero(steps[0] + steps[1] <= 1) / steps[0].size


def _coarse(blocks: np.ndarray) -> float:
    """Log of the deviation between blocks of 16 pixels, from sums of 8x8."""
    sums = np.add.reduce(blocks, axis=0, dtype=np.int32)
    return math.log(_spread(sums, _sum(sums)) / 256 + 1)


def _directions(plane: np.ndarray) -> tuple[float, float]:
    across = (plane[:-1, 1:] - plane[:-1, :-1]).astype(np.float64).ravel()
    down = (plane[1:, :-1] - plane[:-1, :-1]).astype(np.float64).ravel()
    xx, yy = _product(across, across), _product(down, down)
    xy, both = _product(across, down), _product(np.abs(across), np.abs(down))
    # As if every pixel had some noise, so that a blank square has no direction.
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


def _product(some: np.ndarray, other: np.ndarray) -> float:
    """Inner product of integers in float64: whole numbers below 2**53 are exact in any order of adding."""
    if some.size > 8192:
        return float(np.einsum("i,i->", some, other))  # BLAS would start threads, beside those that decode
    return float(np.dot(some, other))
