"""Population stability index (PSI) of image statistics, and its limit for microscopes of the same population.

Images of one microscope are alike, so those of a new one differ from all others without any change of the
population. Groups of the training split, each compared with the rest, show how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.grades import NUM_GRADES
from scalp_core.images.statistics import STATISTICS

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Quantiles of the training split in `Profile.quantiles`, the borders of the bins of the index."""

SOME, STRONG = 0.1, 0.25
"""Thresholds of the index for some and strong drift. They are conventions of credit scoring, not a
statistical test."""

_SHARES = np.array(QUANTILES)
# Share assumed for an empty bin: half an image, but at least this. Otherwise one empty rare tail would flag a
# million images.
_MIN_SHARE = 1e-4
# Images of a group that is compared, number of groups that give a limit, and share of the groups within it.
_MIN_IMAGES, _MIN_GROUPS, _MAX_GROUPS, _WITHIN = 30, 5, 100, 0.95
# Training groups are small; more images of a microscope show more of how it differs. Without the margin, a
# new microscope of the population (400 images) was flagged in 20 % of 160 draws, with it in 8 % of 120.
_MARGIN = 1.5


class Profile(BaseModel):
    """Distribution of one statistic over the training split, the reference for drift."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float = Field(description="mean over the training split")
    std: float = Field(description="standard deviation over the training split")
    quantiles: tuple[float, ...] = Field(description="quantiles 0.01, 0.05, 0.25, 0.5, 0.75, 0.95 and 0.99")
    limit: float | None = Field(
        None,
        description="index that 95 % of the training groups (microscopes or sessions) keep for all "
        "statistics, each compared with the rest; None: fewer than five groups of 30 images",
    )


def psi(now: np.ndarray, expected: np.ndarray, photographs: int) -> float:
    """Compute the population stability index of two rows of shares; empty bins count as half an image."""
    least = max(_MIN_SHARE, 0.5 / max(photographs, 1))
    now, expected = np.maximum(now, least), np.maximum(expected, _MIN_SHARE)
    return float(((now - expected) * np.log(now / expected)).sum())


def quantile_psi(below: np.ndarray, up_to: np.ndarray, photographs: int) -> float:
    """Compute the index from the numbers of images below, and up to, each of the seven quantiles.

    Many images may share one value, such as no dark pixels, and then quantiles are inside this group. In
    training the group was on both sides of the quantile; it is divided here as closely to that as possible.
    """
    count = max(photographs, 1)
    cumulative = np.clip(_SHARES, np.divide(below, count), np.divide(up_to, count))
    return psi(_bin_shares(cumulative), _bin_shares(_SHARES), photographs)


def expected_noise(bins: int, now: int, reference: int) -> float:
    """Mean of the index by chance, for independent images of one population."""
    return (bins - 1) * (1 / now + 1 / reference)


def fit_profiles(statistics: np.ndarray, index: np.ndarray) -> dict[str, Profile]:
    """Describe the distribution of each statistic, and its limit for new groups of the same population.

    Args:
        statistics: float (N, K), in the order of `STATISTICS`.
        index: int (N,), group of each image.
    """
    quantiles = np.quantile(statistics, QUANTILES, axis=0)
    limits = _limits(statistics, index)
    return {
        name: Profile(
            mean=float(values.mean()),
            std=float(values.std()),
            quantiles=tuple(quantiles[:, column].tolist()),
            limit=None if limits is None else float(limits[column]),
        )
        for column, (name, values) in enumerate(zip(STATISTICS, statistics.T, strict=True))
    }


def grade_mix_limit(labels: np.ndarray, groups: Sequence[Any]) -> float | None:
    """Grade mix index that 95 % of the groups keep, each compared with the rest; None if groups are few.

    Args:
        labels: int (N,), grades.
        groups: (N,), group of each image.
    """
    index = np.unique(list(groups), return_inverse=True)[1]
    excess = []
    for group in _large_groups(index):
        now, rest = labels[index == group], labels[index != group]
        shares, expected = (np.bincount(part, minlength=NUM_GRADES) / len(part) for part in (now, rest))
        excess.append(psi(shares, expected, len(now)) - expected_noise(NUM_GRADES, len(now), len(rest)))
    return _MARGIN * max(float(np.quantile(excess, _WITHIN, method="higher")), 0.0) if excess else None


def _large_groups(index: np.ndarray) -> np.ndarray:
    """Groups that are compared with the rest; empty if they are too few to give a limit."""
    groups = np.flatnonzero(np.bincount(index) >= _MIN_IMAGES)
    if len(groups) > _MAX_GROUPS:
        return np.random.default_rng(0).choice(groups, _MAX_GROUPS, replace=False)
    return groups if len(groups) >= _MIN_GROUPS else groups[:0]


def _limits(statistics: np.ndarray, index: np.ndarray) -> np.ndarray | None:
    """Limit of each statistic (K,): in proportion to its mean over groups, so that one factor fits all."""
    groups = _large_groups(index)
    if not len(groups):
        return None
    excess = np.array([_excess(statistics[index == group], statistics[index != group]) for group in groups])
    usual = np.maximum(excess.mean(axis=0), SOME)
    return _MARGIN * usual * np.quantile((excess / usual).max(axis=1), _WITHIN, method="higher")


def _excess(now: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Index of each statistic (K,) of some images against the rest, above that by chance."""
    quantiles = np.quantile(rest, QUANTILES, axis=0)
    below, up_to = ((compare(now[:, None], quantiles)).sum(axis=0) for compare in (np.less, np.less_equal))
    found = [quantile_psi(below[:, column], up_to[:, column], len(now)) for column in range(now.shape[1])]
    return np.maximum(np.array(found) - expected_noise(len(QUANTILES) + 1, len(now), len(rest)), 0)


def _bin_shares(cumulative: np.ndarray) -> np.ndarray:
    """Convert cumulative shares (7,) to shares of the bins between quantiles (8,)."""
    return np.diff(cumulative, prepend=0.0, append=1.0)
