"""Non-inferiority of a candidate model to a reference model, on the same labeled images.

A point estimate of the loss leaves the decision to chance: with 458 images, a model with a true loss of 0.01
of kappa shows less than half of it in a third of all draws. So the upper bound of the loss decides: that of
the paired difference, resampled over groups (microscopes or sessions): images of a group are dependent.
Few images with equal answers prove little: a bound is at least the loss that as many images would reveal with
the given confidence (rule of three).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.evaluation.bootstrap import upper_bound
from scalp_core.evaluation.paired import Answers, resample_answers, unseen_loss

MAX_DROP = 0.01
"""Largest acceptable loss of kappa and of coverage, at the confidence of `CONFIDENCE`."""

CONFIDENCE = 0.95


class Comparison(BaseModel):
    """A candidate compared with a reference; each `…_bound` is the upper confidence bound of the loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int = Field(description="images, graded both ways")
    groups: int = Field(description="resampled groups: microscopes or sessions")
    confidence: float = Field(description="one-sided confidence of each bound")
    max_drop: float = Field(description="largest acceptable bound")
    qwk_drop: float | None = Field(description="kappa of the reference minus that of the candidate")
    qwk_drop_bound: float | None = Field(description="None for a single group or if kappa is undefined")
    coverage: float = Field(description="share of the candidate's grade sets that contain the true grade")
    promised_coverage: float = Field(description="coverage that the bundle promises")
    coverage_drop: float = Field(description="coverage of the reference minus that of the candidate")
    coverage_drop_bound: float | None = Field(
        description="smaller bound of the losses against the reference and against the promise"
    )

    @property
    def losses(self) -> dict[str, str]:
        """Describe the losses and their bounds, for a comparison that has bounds."""
        limit = f"at most, with {self.confidence:.1%} confidence (limit {self.max_drop:g})"
        coverage = f"{self.coverage_drop:.4f}"
        if self.coverage_drop_bound is not None and self.coverage_drop_bound < self.coverage_drop:
            # Then the bound is that of the loss against the promise.
            below = self.promised_coverage - self.coverage
            coverage += f", and {below:.4f} of the promised {self.promised_coverage:.3f}"
        return {
            "kappa lost": f"{self.qwk_drop:.4f}; {self.qwk_drop_bound:.4f} {limit}",
            "coverage lost": f"{coverage}; {self.coverage_drop_bound:.4f} {limit}",
        }

    @property
    def failure(self) -> str | None:
        """The reason why the candidate may be worse than acceptable; None if it is not inferior."""
        limit = f"accepted is {self.max_drop:g}; n {self.images:,} in {self.groups} groups"
        for name, drop, bound in (
            ("kappa", self.qwk_drop, self.qwk_drop_bound),
            ("coverage of grade sets", self.coverage_drop, self.coverage_drop_bound),
        ):
            if drop is None or bound is None:
                return f"{self.images:,} images in {self.groups} group(s) give no bound of the loss of {name}"
            if not bound <= self.max_drop:
                return (
                    f"the loss of {name} is {drop:.4f}, and may be as large as {bound:.4f} "
                    f"({self.confidence:.1%} confidence; {limit})"
                )
        return None


def compare(
    labels: np.ndarray,
    reference: Answers,
    candidate: Answers,
    groups: Sequence[Any],
    promised_coverage: float,
    max_drop: float = MAX_DROP,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Bound the loss of kappa and coverage from the reference to the candidate.

    Args:
        labels: int (N,), 0..3.
        reference: Answers of the current model.
        candidate: Answers of the other model to the same images.
        groups: (N,), the microscope or session of each image.
        promised_coverage: Promised share of the candidate's grade sets that contain the true grade.
        max_drop: Largest acceptable bound of a loss.
        confidence: One-sided confidence of each bound.
    """
    (before, after), count = resample_answers(labels, [reference, candidate], groups)
    drops = {
        "qwk": before["qwk"] - after["qwk"],
        "coverage": before["coverage"] - after["coverage"],
        "promise": promised_coverage - after["coverage"],
    }
    bounds = {name: upper_bound(drop[1:], count, confidence) for name, drop in drops.items()}
    for name in ("qwk", "coverage"):
        if (bound := bounds[name]) is not None:
            bounds[name] = max(bound, unseen_loss(name, labels, reference, confidence))
    against_reference, against_promise = bounds["coverage"], bounds["promise"]
    return Comparison(
        images=len(labels),
        groups=count,
        confidence=confidence,
        max_drop=max_drop,
        qwk_drop=None if np.isnan(drops["qwk"][0]) else float(drops["qwk"][0]),
        qwk_drop_bound=bounds["qwk"],
        coverage=float(after["coverage"][0]),
        promised_coverage=promised_coverage,
        coverage_drop=float(drops["coverage"][0]),
        coverage_drop_bound=None
        if against_reference is None or against_promise is None
        else min(against_reference, against_promise),
    )
