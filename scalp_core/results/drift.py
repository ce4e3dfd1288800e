"""Drift: difference of new images from the training split, by image statistics and the grade mix.

Statistics are counted during grading and compared on request. A flag is a request to look at images, not a
verdict: another clinic may have another grade mix or microscope for good reasons. Without a flag there may
still be drift that the statistics do not measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.bundles.contract import BundleSpec
from scalp_core.images.gates import Gates
from scalp_core.images.stability import (
    QUANTILES,
    SOME,
    STRONG,
    Profile,
    expected_noise,
    psi,
    quantile_psi,
)  # fmt: skip
from scalp_core.images.statistics import STATISTICS, STATISTICS_VERSION

Level = Literal["none", "some", "strong", "too_few"]

# By noise alone, n images like the m of training have a mean index over 8 bins of 7 (1/n + 1/m), which is
# subtracted before the index is compared with a threshold.
MIN_PHOTOGRAPHS = 150
"""Smallest n m / (n + m), for n new images and m training images, that distinguishes drift from noise."""

_MAX_NOISE = len(QUANTILES) / MIN_PHOTOGRAPHS
_NAMED = 4  # statistics named in the sentence
GRADE_MIX = "the grade mix"


class Counts(BaseModel):
    """Counts of images against the training quantiles, for `measure_drift`; shards are added with `+`.

    Values are per statistic, in the order of `STATISTICS`, against the seven quantiles of `Profile`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistics_version: Literal[2] = STATISTICS_VERSION
    photographs: int = Field(description="images that could be decoded")
    below: tuple[tuple[int, ...], ...] = Field(description="images below each quantile")
    up_to: tuple[tuple[int, ...], ...] = Field(description="images below or at each quantile")
    sums: tuple[float, ...]
    squares: tuple[float, ...] = Field(description="sums of squares")

    @classmethod
    def empty(cls) -> Counts:
        """Return counts of zero images, the start of a sum."""
        count = len(STATISTICS)
        zeros = ((0,) * len(QUANTILES),) * count
        return cls(photographs=0, below=zeros, up_to=zeros, sums=(0.0,) * count, squares=(0.0,) * count)

    def __add__(self, other: Counts) -> Counts:
        return _counts(
            self.photographs + other.photographs,
            *(
                np.add(getattr(self, name), getattr(other, name))
                for name in ("below", "up_to", "sums", "squares")
            ),
        )


class StatisticDrift(BaseModel):
    """One statistic of `statistics.STATISTICS`, now and at training."""

    name: str
    mean: float
    mean_at_training: float
    shift: float | None = Field(
        description="shift of the mean, in standard deviations of training; None if constant there"
    )
    psi: float
    level: Level


class GradeDrift(BaseModel):
    """Shares of the grades by name: answered now, and answered on the images of the calibration."""

    shares: dict[str, float]
    shares_at_training: dict[str, float] = Field(
        description="answered on the images of the calibration; of older bundles, labels of training"
    )
    psi: float
    level: Level


class Drift(BaseModel):
    """Drift of images from the training split, by `measure_drift`."""

    photographs: int
    statistics: list[StatisticDrift] | None = Field(description="None without gates or counts")
    grades: GradeDrift
    level: Level = Field(description="strongest level of all")
    flag: bool = Field(description="whether a person should look at images")
    sentence: str = Field(description="summary in one line, with the names of the statistics")


def count_statistics(statistics: np.ndarray, gates: Gates) -> Counts:
    """Count images between the quantiles of the training split.

    Args:
        statistics: float (N, K) from `statistics.measure`, only of photographs that could be decoded.
        gates: Gates of the bundle.
    """
    values = statistics.astype(np.float64)
    quantiles = np.array([gates.profile[name].quantiles for name in STATISTICS])
    compared = values[:, :, None]
    return _counts(
        len(values),
        (compared < quantiles).sum(axis=0),
        (compared <= quantiles).sum(axis=0),
        values.sum(axis=0),
        (values**2).sum(axis=0),
    )


def measure_drift(counts: Counts | None, by_grade: Mapping[str, int], spec: BundleSpec) -> Drift:
    """Measure the drift of images from the training split of a bundle.

    Args:
        counts: Counts of the images; None if unavailable.
        by_grade: Number of images per name of the predicted grade.
        spec: Contract of the bundle; without gates only the grade mix is compared.
    """
    grades = _grade_drift(by_grade, spec)
    statistics = None
    if spec.gates is not None and counts is not None:
        statistics = [
            _statistic_drift(index, name, profile, counts, spec.gates.photographs)
            for index, (name, profile) in enumerate(spec.gates.profile.items())
        ]
    levels = {grades.level, *(statistic.level for statistic in statistics or ())}
    level = next(name for name in ("strong", "some", "none", "too_few") if name in levels)
    return Drift(
        photographs=counts.photographs if counts else sum(by_grade.values()),
        statistics=statistics,
        grades=grades,
        level=level,
        flag=level == "strong",
        sentence=_sentence(level, statistics, grades, spec.gates is not None),
    )


def _counts(
    photographs: int, below: np.ndarray, up_to: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> Counts:
    return Counts(
        photographs=photographs,
        below=tuple(map(tuple, below.tolist())),
        up_to=tuple(map(tuple, up_to.tolist())),
        sums=tuple(sums.tolist()),
        squares=tuple(squares.tolist()),
    )


def _statistic_drift(
    index: int, name: str, profile: Profile, counts: Counts, at_training: int
) -> StatisticDrift:
    n = counts.photographs
    index_value = quantile_psi(np.array(counts.below[index]), np.array(counts.up_to[index]), n)
    mean = counts.sums[index] / max(n, 1)
    return StatisticDrift(
        name=name,
        mean=mean,
        mean_at_training=profile.mean,
        shift=(mean - profile.mean) / profile.std if profile.std else None,
        psi=index_value,
        level=_level(index_value, len(QUANTILES) + 1, n, at_training, profile.limit or 0.0),
    )


def _grade_drift(by_grade: Mapping[str, int], spec: BundleSpec) -> GradeDrift:
    now, reference = np.array([by_grade.get(name, 0) for name in spec.grade_names]), _answered_counts(spec)
    shares, expected = now / max(now.sum(), 1), reference / max(reference.sum(), 1)
    index_value = psi(shares, expected, int(now.sum()))
    return GradeDrift(
        shares=dict(zip(spec.grade_names, shares.tolist(), strict=True)),
        shares_at_training=dict(zip(spec.grade_names, expected.tolist(), strict=True)),
        psi=index_value,
        level=_level(
            index_value, len(now), int(now.sum()), int(reference.sum()), spec.training.grade_mix_limit or 0.0
        ),
    )


def _answered_counts(spec: BundleSpec) -> np.ndarray:
    """Answered grades on the images of the calibration: a model may never answer a rare grade.

    Bundles without a confusion matrix have the labels of the training split.
    """
    metrics = spec.metrics.get("calibration") or spec.metrics.get("val") or {}
    if "confusion" in metrics:
        return np.sum(metrics["confusion"], axis=0)
    return np.array(spec.training.grade_counts)


def _level(index_value: float, bins: int, now: int, reference: int, limit: float = 0.0) -> Level:
    """Level of an index; `limit` is that of other microscopes of the same population."""
    if not now or not reference or expected_noise(bins, now, reference) > _MAX_NOISE:
        return "too_few"
    excess = index_value - expected_noise(bins, now, reference)
    if excess < max(SOME, limit):
        return "none"
    return "some" if excess < max(STRONG, limit) else "strong"


def list_drifting(drift: Drift) -> list[str]:
    """Names of the statistics of the strongest level, the most different first, then `GRADE_MIX`."""
    return _list_drifting(drift.level, drift.statistics, drift.grades)


def _list_drifting(level: Level, statistics: list[StatisticDrift] | None, grades: GradeDrift) -> list[str]:
    by_psi = sorted(statistics or (), key=lambda statistic: -statistic.psi)
    names = [statistic.name for statistic in by_psi if statistic.level == level]
    return names + [GRADE_MIX] * (grades.level == level)


def _sentence(level: Level, statistics: list[StatisticDrift] | None, grades: GradeDrift, gates: bool) -> str:
    names = _list_drifting(level, statistics, grades)
    is_mix = names[-1:] == [GRADE_MIX]
    count = len(names) - is_mix
    if count > _NAMED:
        names[_NAMED:count] = [f"{count - _NAMED} more"]
    listed = " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])
    verb = "differs" if len(names) == 1 else "differ"
    sentence = {
        "strong": f"DRIFT: {listed} {verb} strongly from the training split; look at some images before "
        "trusting the grades",
        "some": f"some drift: {listed} {verb} somewhat from the training split",
        "none": "no drift: all compared values are like the training split",
        "too_few": f"too few images, here or in training, to detect drift; {MIN_PHOTOGRAPHS} are needed",
    }[level]
    if statistics is None:
        why = "nothing else was counted" if gates else "the bundle has no gates"
        sentence += f" (only the grade mix was compared: {why})"
    return sentence
