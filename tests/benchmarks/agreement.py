"""Agreement of grades: all candidates of a benchmark must do the same work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from jobs.bench import inputs
from jobs.bench.measure import OwnProcess
from scalp_core.bundles.loading import load_bundle
from scalp_core.inference.predictor import Hardware, Predictor

_BATCH = 32
MIN_AGREEMENT = 0.98
"""Least fraction of a candidate's grades that equal scalp's."""


def check_agreement(what: str, grades: Mapping[Any, int], reference: Mapping[Any, int]) -> float:
    """Fraction of the grades that equal the reference.

    Args:
        what: Name of the candidate.
        grades: The candidate's grade per image.
        reference: scalp's grade per image.

    Raises:
        RuntimeError: The images differ, or fewer than `MIN_AGREEMENT` of the grades are equal.
    """
    if grades.keys() != reference.keys():
        raise RuntimeError(f"{what}: its images differ from those of scalp")
    agreement = statistics.mean(grades[image] == grade for image, grade in reference.items())
    if agreement < MIN_AGREEMENT:
        raise RuntimeError(
            f"{what}: {agreement:.1%} of grades equal those of scalp, below {MIN_AGREEMENT:.0%}"
        )
    return round(agreement, 4)


def decided_images(files: list[bytes], bundle: str, device: Hardware) -> list[bytes]:
    """The half of the files whose grades are clearest, in their order.

    Other decoders and precisions change grades near a threshold, and random weights put many images near one.
    The cost of an image does not depend on its grade.

    Args:
        files: JPEG files.
        bundle: Local bundle directory.
        device: Device of the model, which runs in a separate process.
    """
    own = OwnProcess()
    try:
        margins = own.call(_margins, files, bundle, device)
    finally:
        own.close()
    clearest = np.argsort(-margins, kind="stable")[: math.ceil(len(files) / 2)]
    return [files[index] for index in np.sort(clearest)]


def _margins(files: list[bytes], bundle: str, device: Hardware) -> np.ndarray:
    """Probability of the likeliest grade minus that of the next, float (N,)."""
    predictor, margins = Predictor(load_bundle(bundle), device), []
    for start in range(0, len(files), _BATCH):
        images = inputs.decoded(files[start : start + _BATCH], predictor.spec.preprocess)
        ordered = np.sort([grading.probabilities for grading in predictor.grade(images)], axis=1)
        margins.append(ordered[:, -1] - ordered[:, -2])
    return np.concatenate(margins)
