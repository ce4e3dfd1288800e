"""Fit the decision of a bundle on labeled images: calibration, grade sets and referral rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scalp_core.bundles.contract import BundleSpec
from scalp_core.evaluation.targets import Kind
from scalp_core.images import gates as image_gates
from scalp_core.inference import calibration, conformal, referral


def fit_decision(
    spec: BundleSpec,
    logits: np.ndarray,
    statistics: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Any],
    *,
    coverage: float,
    targets: Mapping[Kind, float],
    prior_moved: bool,
) -> BundleSpec:
    """Return the contract with calibration, grade sets and referral rule fitted on labeled images.

    Args:
        spec: Contract of the bundle, with its gates, whose referrals the targets take into account.
        logits: float (N, 4), finite.
        statistics: float (N, K) from `images.statistics.measure`.
        labels: int (N,), true grades.
        groups: (N,), group of each image.
        coverage: Least promised coverage of the grade sets.
        targets: Limits of referral by kind, from `evaluation.targets.parse_targets`.
        prior_moved: Whether the shares of grades that the model learned differ from those of the images.
    """
    return fit_flagged_decision(
        spec, logits, flag_images(spec, statistics), labels, groups,
        coverage=coverage, targets=targets, prior_moved=prior_moved,
    )  # fmt: skip


def flag_images(spec: BundleSpec, statistics: np.ndarray) -> np.ndarray:
    """Whether a gate of the bundle refers each image, bool (N,), from statistics (N, K)."""
    if spec.gates is None:
        return np.zeros(len(statistics), bool)
    return np.any(list(image_gates.flag_images(statistics, spec.gates).values()), axis=0)


def fit_flagged_decision(
    spec: BundleSpec,
    logits: np.ndarray,
    flagged: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Any],
    *,
    coverage: float,
    targets: Mapping[Kind, float],
    prior_moved: bool,
) -> BundleSpec:
    """Fit as `fit_decision`, for images of which it is known whether a gate refers them.

    Args:
        flagged: bool (N,), from `flag_images`; the other arguments are those of `fit_decision`.
    """
    bias = None
    if prior_moved:
        temperature, bias = calibration.fit_temperature_and_bias(logits, labels)
    else:
        temperature = calibration.fit_temperature(logits, labels)
    probs = calibration.probabilities(logits, temperature, bias)
    return spec.model_copy(
        update={
            "temperature": temperature,
            "bias": bias,
            "conformal": conformal.fit_conformal(probs, labels, groups, coverage),
            "referral": referral.fit_referral(probs, labels, groups, flagged, targets),
        }
    )
