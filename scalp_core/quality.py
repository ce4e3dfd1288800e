"""Is this a photograph like those the model knows? Statistics of a decoded square, and limits for them.

`measure` runs wherever a photograph is decoded to be graded. `fit` runs once, at the end of training; what it
returns lives in the bundle, and `flags` and `unlikeness` apply it.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

STATISTICS = (
    "luma_mean",  # 0..1
    "luma_std",  # log
    "luma_skew",
    "coarse_std",  # log of the deviation of luminance between blocks of 16 pixels
    "dark_share",  # of pixels below 16
    "bright_share",  # of pixels above 239
    "flat_share",  # of pixels whose neighbours differ by no more than one level: drawn, not photographed
    "sharpness_1",  # log of the mean absolute Laplacian, at full size,
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

    photographs: int = Field(description="of the training part that were measured")
    min_sharpness: float = Field(description="of `sharpness_1`; below it a photograph is blurred")
    min_luma: float = Field(description="of `luma_mean`; below it a photograph is too dark")
    max_luma: float = Field(description="of `luma_mean`; above it a photograph is too bright")
    limit: float = Field(gt=0, description="Mahalanobis distance above which it is unlike the training part")
    centre: tuple[float, ...] = Field(description="median of each statistic")
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
        if {len(self.centre), len(self.scale), len(self.precision), *map(len, self.precision)} != {count}:
            raise ValueError(f"centre, scale and precision must have {count} entries a side")
        return self


def measure(pixels: np.ndarray) -> np.ndarray:
    """The statistics of one decoded photograph.

    Sums are of integers, so that equal bytes give equal statistics whatever adds them up.

    Args:
        pixels: uint8 (size, size, 3), RGB, from `preprocess.decode`.

    Returns:
        float32 (K,), as `STATISTICS` names them.
    """
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.int16)
    luma = (2 * planes[0] + 5 * planes[1] + planes[2]) >> 3
    half = _halved(luma)
    quarter = _halved(half)
    mean, spread = _spread(half)
    edges = [_laplacian(level) for level in (luma, half, quarter)]
    return np.array(
        [
            mean / 255,
            math.log(spread + 1),
            _skew(quarter),
            math.log(_spread(_halved(_halved(quarter)))[1] + 1),
            np.count_nonzero(luma < _DARK) / luma.size,
            np.count_nonzero(luma > _BRIGHT) / luma.size,
            _flat_share(luma),
            *[math.log(_sum(edge) / edge.size + 0.1) for edge in edges],
            *[_peakedness(edge) for edge in edges[1:]],
            *_directions(quarter),
            *_colours(*_halved(planes)),
        ],
        np.float32,
    )


def measure_all(images: np.ndarray) -> np.ndarray:
    """`measure` of uint8 (N, size, size, 3): float32 (N, K)."""
    return np.array([measure(image) for image in images], np.float32).reshape(len(images), len(STATISTICS))


def fit(train: np.ndarray, val: np.ndarray) -> Gates:
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
    low, centre, high = np.quantile(train, (0.25, 0.5, 0.75), axis=0)
    # The quartiles of a normal distribution are 1.349 deviations apart.
    scale = np.maximum(np.maximum((high - low) / 1.349, train.std(axis=0) / 2), _MIN_SCALE)
    covariance = LedoitWolf(assume_centered=True).fit((train - centre) / scale).covariance_
    precision = np.linalg.inv(covariance + _MORE_VARIANCE * np.eye(len(scale)))
    usual = max(
        np.quantile(_distance(part, centre, scale, precision), _SHARE, method="higher")
        for part in (train, val)
    )
    luma = train[:, STATISTICS.index("luma_mean")]
    sharpness = train[:, STATISTICS.index("sharpness_1")]
    return Gates(
        photographs=len(train),
        min_sharpness=_beyond(sharpness, _LAST, _MIN_SHARPNESS_MARGIN),
        min_luma=_beyond(luma, _LAST, _MIN_LUMA_MARGIN),
        max_luma=_beyond(luma, 1 - _LAST, _MIN_LUMA_MARGIN),
        limit=_MARGIN * float(usual),
        centre=tuple(centre.tolist()),
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
    distance = _distance(statistics, *map(np.array, (gates.centre, gates.scale, gates.precision)))
    # Rounded: a product of matrices may differ in its last bits from one number of rows to another.
    return np.round(distance / gates.limit, 6)


def flags(statistics: np.ndarray, gates: Gates) -> dict[str, np.ndarray]:
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
    statistics: np.ndarray, centre: np.ndarray, scale: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    scaled = (statistics.astype(np.float64) - centre) / scale
    return np.sqrt(np.maximum(((scaled @ precision) * scaled).sum(axis=1), 0))


def _beyond(values: np.ndarray, share: float, margin: float) -> float:
    middle, last = np.quantile(values, (0.5, share))
    away = max(abs(last - middle), margin)
    return float(last + away if share > 0.5 else last - away)


def _profile(values: np.ndarray) -> Profile:
    quantiles = tuple(np.quantile(values, QUANTILES).tolist())
    return Profile(mean=float(values.mean()), std=float(values.std()), quantiles=quantiles)


def _halved(plane: np.ndarray) -> np.ndarray:
    """Means of blocks of 2x2 of int16 (..., H, W); an odd last row or column is left out."""
    height, width = plane.shape[-2] // 2 * 2, plane.shape[-1] // 2 * 2
    rows = plane[..., :height:2, :] + plane[..., 1:height:2, :]
    return (rows[..., :width:2] + rows[..., 1:width:2] + 2) >> 2


def _spread(plane: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = plane.astype(np.float64)  # whole numbers below 2**53: exact in any order of adding
    mean = float(values.sum()) / plane.size
    return mean, max(float(np.einsum("ij,ij->", values, values)) / plane.size - mean**2, 0.0) ** 0.5


def _skew(plane: np.ndarray) -> float:
    mean, spread = _spread(plane)
    values = plane.astype(np.float64)
    squares = values * values
    second = float(squares.sum()) / plane.size
    third = float(np.einsum("ij,ij->", squares, values)) / plane.size
    return (third - 3 * mean * second + 2 * mean**3) / (spread**2 + 1) ** 1.5


def _laplacian(plane: np.ndarray) -> np.ndarray:
    """Its absolute value."""
    middle = plane[1:-1, 1:-1]
    return np.abs(4 * middle - plane[:-2, 1:-1] - plane[2:, 1:-1] - plane[1:-1, :-2] - plane[1:-1, 2:])


def _peakedness(edge: np.ndarray) -> float:
    size = edge.astype(np.float64)
    square = float(np.einsum("ij,ij->", size, size)) / size.size
    return math.log((square + 1) / ((float(size.sum()) / size.size) ** 2 + 1))


def _flat_share(luma: np.ndarray) -> float:
    here = luma[:-1:2, :-1]  # every other row is enough
    step = np.abs(luma[:-1:2, 1:] - here) + np.abs(luma[1::2, :-1] - here)
    return np.count_nonzero(step <= 1) / step.size


def _directions(plane: np.ndarray) -> tuple[float, float]:
    across = (plane[:-1, 1:] - plane[:-1, :-1]).astype(np.float64)
    down = (plane[1:, :-1] - plane[:-1, :-1]).astype(np.float64)
    xx, yy = float(np.einsum("ij,ij->", across, across)), float(np.einsum("ij,ij->", down, down))
    product = across * down
    xy, both = float(product.sum()), float(np.abs(product).sum())
    total = xx + yy + across.size  # as if every pixel had some noise, so that a blank square has no direction
    return ((xx - yy) ** 2 + 4 * xy**2) ** 0.5 / total, 1 - 2 * both / total


def _colours(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> list[float]:
    means = [_sum(plane) / plane.size + 1 for plane in (red, green, blue)]
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return [
        math.log(means[0] / means[1]),
        math.log(means[2] / means[1]),
        math.log(_spread(red - green)[1] + 1),
        math.log(_spread((red + green >> 1) - blue)[1] + 1),
        1 - (_sum(low) + low.size) / (_sum(high) + high.size),
    ]


def _sum(plane: np.ndarray) -> int:
    return int(plane.sum(dtype=np.int64))
