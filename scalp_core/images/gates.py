"""Quality and out-of-distribution gates: limits on the statistics of an image.

`fit_gates` runs once, at the end of training, and the bundle stores its result; `flag_images` and
`unlikeness` apply it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core.images.stability import Profile, fit_profiles
from scalp_core.images.statistics import STATISTICS, STATISTICS_VERSION

# The limit is this factor above the 99 % quantile of known images, because unseen microscopes differ more
# than known ones.
_SHARE, _MARGIN = 0.99, 1.25
# A statistic that was constant in training may vary elsewhere: the least scale of a statistic, in its unit,
# and a term added to the variance of each combination of statistics, which is about 1.
_MIN_SCALE, _MORE_VARIANCE = 0.02, 0.05
# Junk is this factor beyond the robust distance that 85 % of the training images keep, so up to 15 % may be
# junk. Fewer images per statistic than this give no robust covariance.
_JUNK_FACTOR, _USUAL_SHARE, _IMAGES_PER_STATISTIC = 2.0, 0.85, 5
# A group of at least as many images, most of them far, is another kind of microscope and not junk.
_MIN_GROUP = 10
# Quality limits are beyond the extremes of the training split by their distance to the median, at least this.
_LAST, _MIN_LUMA_MARGIN, _MIN_SHARPNESS_MARGIN = 0.005, 0.1, 0.5

BLURRED, TOO_DARK, TOO_BRIGHT, UNLIKE_TRAINING = "blurred", "too_dark", "too_bright", "unlike_training"


class Gates(BaseModel):
    """Limits on the statistics of an image: quality and out-of-distribution gates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistics_version: Literal[2] = Field(description="version of `measure` at the time of fitting")
    photographs: int = Field(description="number of training images that were measured")
    min_sharpness: float = Field(description="limit on `sharpness_1`; below it an image is blurred")
    min_luma: float = Field(description="limit on `luma_mean`; below it an image is too dark")
    max_luma: float = Field(description="limit on `luma_mean`; above it an image is too bright")
    limit: float = Field(gt=0, description="Mahalanobis distance above which an image is out-of-distribution")
    # Spelled as in bundles that exist.
    centre: tuple[float, ...] = Field(description="median of each statistic")
    scale: tuple[float, ...] = Field(description="robust standard deviation of each statistic")
    precision: tuple[tuple[float, ...], ...] = Field(
        description="inverse covariance of the scaled statistics"
    )
    profile: dict[str, Profile] = Field(
        description="distribution of each statistic by name, in the order of the other fields"
    )

    @model_validator(mode="after")
    def _are_of_these_statistics(self) -> Gates:
        if tuple(self.profile) != STATISTICS:
            raise ValueError("fitted on other statistics than this version of scalp measures")
        count = len(STATISTICS)
        if {len(self.centre), len(self.scale), len(self.precision), *map(len, self.precision)} != {count}:
            raise ValueError(f"center, scale and precision must have {count} entries per side")
        return self


def fit_gates(train: np.ndarray, val: np.ndarray | None, groups: Sequence[Any] | None = None) -> Gates:
    """Fit the gates of a model on its training and validation images, some of which may be junk.

    Args:
        train: Statistics of training images, float (N, K).
        val: Statistics of validation images, float (M, K), of other microscopes if split by microscope; None:
            each half of the groups is compared with the other half.
        groups: (N,), microscope or session of each training image, the reference of drift; None: unknown.

    Raises:
        ValueError: one of them is empty.
    """
    if not len(train) or (val is not None and not len(val)):
        raise ValueError("gates need images of the training and of the validation split")
    order = np.lexsort(train.T)  # a fixed order, whatever the order of the rows
    train = train[order].astype(np.float64)
    index = np.arange(len(train)) if groups is None else np.unique(groups, return_inverse=True)[1][order]
    usual = _is_usual(train, index)
    train, index = train[usual], index[usual]
    metric = _fit_metric(train)
    distances = [_distance(train, *metric)]
    if val is not None:
        distances.append(_distance(val[np.lexsort(val.T)], *metric))
    else:
        odd = (index if index.max() else np.arange(len(index))) % 2 == 1
        distances += [_distance(train[part], *_fit_metric(train[~part])) for part in (odd, ~odd)]
    center, scale, precision = metric
    luma = train[:, STATISTICS.index("luma_mean")]
    sharpness = train[:, STATISTICS.index("sharpness_1")]
    return Gates(
        statistics_version=STATISTICS_VERSION,
        photographs=len(train),
        min_sharpness=_beyond(sharpness, _LAST, _MIN_SHARPNESS_MARGIN),
        min_luma=_beyond(luma, _LAST, _MIN_LUMA_MARGIN),
        max_luma=_beyond(luma, 1 - _LAST, _MIN_LUMA_MARGIN),
        limit=_MARGIN * max(map(_usual_distance, distances)),
        centre=tuple(center.tolist()),
        scale=tuple(scale.tolist()),
        precision=tuple(map(tuple, precision.tolist())),
        profile=fit_profiles(train, index),
    )


def _fit_metric(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit center (K,), scale (K,) and precision (K, K) of the Mahalanobis distance."""
    from sklearn.covariance import LedoitWolf  # takes a second to import, and grading does not need it

    center, scale = _center_and_scale(statistics)
    covariance = LedoitWolf(assume_centered=True).fit((statistics - center) / scale).covariance_
    return center, scale, np.linalg.inv(covariance + _MORE_VARIANCE * np.eye(len(scale)))


def _is_usual(statistics: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Find the images that are not junk, bool (N,), by their distance from the bulk of the images.

    The minimum covariance determinant (Rousseeuw and Van Driessen 1999) is that of the densest half, so junk
    in the other half does not widen it, as it widens a plain covariance.
    """
    from sklearn.covariance import MinCovDet

    if len(statistics) < _IMAGES_PER_STATISTIC * len(STATISTICS):
        return np.ones(len(statistics), bool)
    center, scale = _center_and_scale(statistics)
    # Noise, as in `_MORE_VARIANCE`: a statistic may be constant in the densest half.
    noise = np.random.default_rng(0).normal(0, math.sqrt(_MORE_VARIANCE), statistics.shape)
    robust = MinCovDet(assume_centered=True, random_state=0).fit((statistics - center) / scale + noise)
    distance = np.sqrt(robust.dist_)
    far = distance > _JUNK_FACTOR * np.quantile(distance, _USUAL_SHARE)
    size = np.bincount(index)
    other_kind = (size >= _MIN_GROUP) & (2 * np.bincount(index, far) > size)
    return ~far | other_kind[index]


def _center_and_scale(statistics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, center, high = np.quantile(statistics, (0.25, 0.5, 0.75), axis=0)
    # The quartiles of a normal distribution are 1.349 standard deviations apart.
    scale = np.maximum(np.maximum((high - low) / 1.349, statistics.std(axis=0) / 2), _MIN_SCALE)
    return center, scale


def _usual_distance(distance: np.ndarray) -> float:
    """Distance that 99 % of the images keep that are not junk."""
    kept = distance[distance <= _JUNK_FACTOR * np.quantile(distance, _USUAL_SHARE)]
    return float(np.quantile(kept, _SHARE, method="higher"))


def unlikeness(statistics: np.ndarray, gates: Gates) -> np.ndarray:
    """Mahalanobis distance from the training split, relative to the limit, float64 (N,).

    Above 1 an image is out-of-distribution.
    """
    distance = _distance(statistics, *map(np.array, (gates.centre, gates.scale, gates.precision)))
    # Rounded, because the last bits of a matrix product depend on its number of rows.
    return np.round(distance / gates.limit, 6)


def flag_images(statistics: np.ndarray, gates: Gates) -> dict[str, np.ndarray]:
    """Flag images that are blurred, too dark, too bright or unlike the training split; bool (N,) by flag."""
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
    median, extreme = np.quantile(values, (0.5, share))
    distance = max(abs(extreme - median), margin)
    return float(extreme + distance if share > 0.5 else extreme - distance)
