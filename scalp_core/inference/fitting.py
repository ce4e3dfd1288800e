"""Fit the decision of a bundle on labeled images: calibration, grade sets and referral rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scalp_core.bundles.contract import BundleSpec, OtherSymptom
from scalp_core.evaluation.targets import Kind
from scalp_core.grades import NUM_GRADES
from scalp_core.images import gates as image_gates
from scalp_core.inference import calibration, conformal, referral

_FEWEST_LABELS = 20  # of a symptom, to fit its temperature


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


def fit_other_symptoms(
    spec: BundleSpec, names: Sequence[str], counts: Sequence[int], logits: np.ndarray, labels: np.ndarray
) -> BundleSpec:
    """Return the contract with the other symptoms, calibrated on labeled images.

    Args:
        spec: Contract of the bundle.
        names: Names of the S - 1 symptoms, in the order of the outputs.
        counts: Training images with a label of each.
        logits: float (N, 4 (S - 1)), finite.
        labels: int (N, S - 1), true grades; -1 without a label. A symptom with fewer than 20 labels, or with
            labels of one grade, gets no temperature, so it is not graded.
    """
    symptoms = []
    for place, (name, images) in enumerate(zip(names, counts, strict=True)):
        known = labels[:, place] >= 0
        own, truth = logits[known, NUM_GRADES * place : NUM_GRADES * (place + 1)], labels[known, place]
        enough = len(truth) >= _FEWEST_LABELS and len(np.unique(truth)) > 1
        temperature = calibration.fit_temperature(own, truth) if enough else None
        symptoms.append(OtherSymptom(name=name, images=images, temperature=temperature))
    return spec.model_copy(update={"other_symptoms": tuple(symptoms)})


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
