"""How later photographs differ from those of training: counted as they pass, compared when someone asks.

A flag asks a person to look, it is no verdict: another clinic may have another grade mix, or another
microscope, for honest reasons. And no flag is no proof: what the statistics do not measure does not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.images.statistics import QUANTILES, STATISTICS, STATISTICS_VERSION, Gates, Profile

Level = Literal["none", "some", "strong", "too_few"]

SOME, STRONG = 0.1, 0.25
"""Population stability index from which there is some, and strong, drift: the bounds of credit scoring, where
it comes from. They are a habit, not a test."""

# Of n photographs like the m of training, the index over 8 bins is 7 (1/n + 1/m) on average, by noise alone:
# at most 7 / 300 here. Of 100,000 simulated draws 0.02 % came above 0.1: one of 19 statistics does in 0.4 %.
MIN_PHOTOGRAPHS = 300
"""The least n m / (n + m), of n photographs now and m at training, at which drift is told from noise."""

# What an empty bin is taken to hold: half a photograph, but no less than this, or one rare tail that nobody
# fell into would flag a million photographs.
_MIN_SHARE = 1e-4
_NAMED = 4
_SHARES = np.array(QUANTILES)


class Counts(BaseModel):
    """What `measure_drift` needs of any number of photographs; those of several shards are added by `+`.

    For each statistic, in the order of `STATISTICS`, against the seven quantiles that `Profile` keeps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistics_version: Literal[2] = STATISTICS_VERSION
    photographs: int = Field(description="that could be decoded")
    below: tuple[tuple[int, ...], ...] = Field(description="photographs below each quantile")
    up_to: tuple[tuple[int, ...], ...] = Field(description="photographs below it or exactly there")
    sums: tuple[float, ...]
    squares: tuple[float, ...] = Field(description="sums of squares")

    @classmethod
    def empty(cls) -> Counts:
        """Of no photograph: the start of a sum."""
        count = len(STATISTICS)
        none = ((0,) * len(QUANTILES),) * count
        return cls(photographs=0, below=none, up_to=none, sums=(0.0,) * count, squares=(0.0,) * count)

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
    shift: float | None = Field(description="of the mean, in deviations of training; None if it never varied")
    psi: float
    level: Level


class GradeDrift(BaseModel):
    """Shares of the grades, by name, as they were answered now and labeled at training."""

    shares: dict[str, float]
    shares_at_training: dict[str, float]
    psi: float
    level: Level


class Drift(BaseModel):
    """What `measure_drift` found."""

    photographs: int
    statistics: list[StatisticDrift] | None = Field(description="None where there are no gates or no counts")
    grades: GradeDrift
    level: Level = Field(description="the strongest of all")
    flag: bool = Field(description="whether a person should look")
    sentence: str = Field(description="one line that says so, and of what")


def count_statistics(statistics: np.ndarray, gates: Gates) -> Counts:
    """Counts photographs between the quantiles of training.

    Args:
        statistics: float (N, K) from `statistics.measure`, only of photographs that could be decoded.
        gates: of the bundle.
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
    """How far photographs are from those a bundle was trained on.

    Args:
        counts: of the photographs; None if nobody counted.
        by_grade: photographs by the name of the grade they got.
        spec: the bundle's contract; without gates only the grade mix is compared.
    """
    grades = _grade_drift(by_grade, spec)
    statistics = None
    if spec.gates is not None and counts is not None:
        statistics = [
            _statistic_drift(index, name, profile, counts, spec.gates.photographs)
            for index, (name, profile) in enumerate(spec.gates.profile.items())
        ]
    levels = {grades.level, *(each.level for each in statistics or ())}
    level = next(each for each in ("strong", "some", "none", "too_few") if each in levels)
    return Drift(
        photographs=counts.photographs if counts else sum(by_grade.values()),
        statistics=statistics,
        grades=grades,
        level=level,
        flag=level == "strong",
        sentence=_sentence(level, statistics, grades, spec.gates is not None),
    )


def psi(now: np.ndarray, expected: np.ndarray, photographs: int) -> float:
    """Population stability index of two rows of shares, empty ones lifted to half a photograph."""
    least = max(_MIN_SHARE, 0.5 / max(photographs, 1))
    now, expected = np.maximum(now, least), np.maximum(expected, _MIN_SHARE)
    return float(((now - expected) * np.log(now / expected)).sum())


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
    n = max(counts.photographs, 1)
    # Many photographs may share one value, such as no dark pixel at all, and quantiles then fall inside of
    # them. Those of training lay on both sides; so do these, as nearly in training's shares as they can.
    cumulative = np.clip(_SHARES, np.divide(counts.below[index], n), np.divide(counts.up_to[index], n))
    found = psi(_steps(cumulative), _steps(_SHARES), counts.photographs)
    mean = counts.sums[index] / n
    return StatisticDrift(
        name=name,
        mean=mean,
        mean_at_training=profile.mean,
        shift=(mean - profile.mean) / profile.std if profile.std else None,
        psi=found,
        level=_level(found, counts.photographs, at_training),
    )


def _steps(cumulative: np.ndarray) -> np.ndarray:
    """Shares of the bins between quantiles: (7,) to (8,)."""
    return np.diff(cumulative, prepend=0.0, append=1.0)


def _grade_drift(by_grade: Mapping[str, int], spec: BundleSpec) -> GradeDrift:
    now = np.array([by_grade.get(name, 0) for name in spec.grade_names])
    then = np.array(spec.training.grade_counts)
    shares, expected = now / max(now.sum(), 1), then / max(then.sum(), 1)
    found = psi(shares, expected, int(now.sum()))
    return GradeDrift(
        shares=dict(zip(spec.grade_names, shares.tolist(), strict=True)),
        shares_at_training=dict(zip(spec.grade_names, expected.tolist(), strict=True)),
        psi=found,
        level=_level(found, int(now.sum()), int(then.sum())),
    )


def _level(found: float, now: int, at_training: int) -> Level:
    if now * at_training < MIN_PHOTOGRAPHS * (now + at_training) or not now:
        return "too_few"
    if found < SOME:
        return "none"
    return "some" if found < STRONG else "strong"


def _sentence(level: Level, statistics: list[StatisticDrift] | None, grades: GradeDrift, gates: bool) -> str:
    names = [
        each.name for each in sorted(statistics or (), key=lambda each: -each.psi) if each.level == level
    ]
    if len(names) > _NAMED:
        names[_NAMED:] = [f"{len(names) - _NAMED} more"]
    if grades.level == level:
        names.append("the grade mix")
    listed = " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])
    be = "is" if len(names) == 1 else "are"
    said = {
        "strong": f"DRIFT: {listed} {be} strongly unlike the training part; look at some photographs before "
        "trusting the grades",
        "some": f"some drift: {listed} {be} somewhat unlike the training part",
        "none": "no drift: what could be compared is like the training part",
        "too_few": f"too few photographs, here or at training, to tell drift: it takes {MIN_PHOTOGRAPHS}",
    }[level]
    if statistics is None:
        why = "nothing else was counted" if gates else "the bundle has no gates"
        said += f" (only the grade mix was compared: {why})"
    return said
