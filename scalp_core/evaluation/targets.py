"""Targets of referral: a share that must be kept with a confidence, on images of new microscopes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.evaluation.bootstrap import group_indices

CONFIDENCE = 0.95
"""One-sided confidence with which a referral rule keeps its target."""

SEVERE_FROM = 2
"""Lowest grade of the target `found`: moderate."""

Kind = Literal["wrong", "found"]
KINDS: tuple[Kind, ...] = ("wrong", "found")

_TARGET = re.compile(r"\s*(wrong\s*<=|found\s*>=)\s*(\d+(?:\.\d+)?)\s*%\s*")
_EXAMPLE = "write wrong<=5%, found>=95%, both with a comma, or none"


class Target(BaseModel):
    """A target of the referral rule, and the figures of the images that the rule was fitted on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = Field(
        description="wrong: share of wrong grades among the answered images; found: share of the images of "
        "moderate or worse that are graded so or referred"
    )
    limit: float = Field(description="largest share of wrong, or smallest share of found")
    confidence: float = Field(CONFIDENCE, description="one-sided confidence over new groups of images")
    images: int = Field(description="images in the share")
    groups: int = Field(description="their groups: microscopes or sessions; if 1, images count as groups")
    share: float | None = Field(description="measured share; None without such an image")
    bound: float | None = Field(description="confidence bound of the share")
    answered: float = Field(description="share of all images that are not referred")

    def __str__(self) -> str:
        what = {"wrong": "wrong among answered", "found": "moderate or worse found"}[self.kind]
        sign, bound = ("<=", "at most") if self.kind == "wrong" else (">=", "at least")
        if self.share is None or self.bound is None:
            measured = {
                "wrong": "not proved by the labeled images, so each image is referred",
                "found": "without a labeled image of moderate or worse",
            }[self.kind]
        else:
            measured = (
                f"{self.share:.1%} of {self.images:,} images in {self.groups} groups, {bound} "
                f"{self.bound:.1%} with {self.confidence:.0%} confidence"
            )
        return f"{what} {sign} {self.limit:.4g}: {measured}; {self.answered:.1%} answered"


def parse_targets(text: str) -> dict[Kind, float]:
    """Parse targets such as `wrong<=5%, found>=95%` to the limits by kind; `none` gives an empty dictionary.

    Raises:
        ValueError: The text has another form, or a limit is not between 0 and 100 %.
    """
    if text.strip() == "none":
        return {}
    limits: dict[Kind, float] = {}
    for word in text.split(","):
        match = _TARGET.fullmatch(word)
        if match is None:
            raise ValueError(f"{word.strip()!r} is not a target; {_EXAMPLE}")
        kind: Kind = "wrong" if match[1].startswith("wrong") else "found"
        limit = float(match[2]) / 100
        if kind in limits or not 0 < limit < 1:
            raise ValueError(f"{word.strip()!r} is repeated, or not between 0 and 100 %; {_EXAMPLE}")
        limits[kind] = limit
    return limits


def independent_units(groups: Sequence[Any]) -> np.ndarray:
    """Number the independent units of images, int (N,): their groups, or with a single group each image.

    With a single group, a promise holds for that microscope alone.
    """
    index = group_indices(groups)
    return index if index.max() else np.arange(len(index))


def bound_share(events: np.ndarray, units: np.ndarray, confidence: float = CONFIDENCE) -> float:
    """Upper confidence bound of the share of images with an event, for images in groups.

    Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data": the exact binomial bound with the effective number of images, which is
    smaller if images of a group are alike, and if groups are few.

    Args:
        events: bool (N,).
        units: int (N,), from `independent_units`.
        confidence: One-sided confidence.

    Returns:
        The bound; 1 for images of a single unit, which prove nothing.
    """
    # Equal to `scipy.stats`, which takes half a second to import and 0.1 ms per quantile.
    from scipy.special import betaincinv, stdtrit  # grading does not need it

    n, count = len(events), int(events.sum())
    groups = np.unique(units, return_inverse=True)[1]
    size = np.bincount(groups)
    if count == n or len(size) < 2:
        return 1.0
    share = count / n
    residuals = np.bincount(groups, events) - share * size
    variance = len(size) / (len(size) - 1) * float(residuals @ residuals) / n**2
    effective = min(n, share * (1 - share) / variance) if variance else n
    ratio = stdtrit(n - 1, confidence) / stdtrit(len(size) - 1, confidence)
    effective *= ratio**2
    return float(betaincinv(share * effective + 1, (1 - share) * effective, confidence))


def measure_share(kind: Kind, labels: np.ndarray, grades: np.ndarray, refer: np.ndarray) -> float | None:
    """Measure the share of a target on labeled images; None without an image in it.

    Args:
        kind: As in `Target`.
        labels: int (N,), 0..3.
        grades: int (N,), predicted.
        refer: bool (N,), whether the image is referred.
    """
    inside, events = outcomes(kind, labels, grades, refer)
    if not inside.any():
        return None
    share = float(events[inside].mean())
    return 1 - share if kind == "found" else share


def outcomes(
    kind: Kind, labels: np.ndarray, grades: np.ndarray, refer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Images in the share of a target, bool (N,), and those that are wrong or were not found, bool (N,)."""
    if kind == "wrong":
        return ~refer, grades != labels
    return labels >= SEVERE_FROM, ~refer & (grades < SEVERE_FROM)
