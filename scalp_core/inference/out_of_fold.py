"""Out-of-fold answers: a decision fitted on all images, and measured on folds that it was not fitted on.

Each image is answered by the one of K models that was trained without its group. These answers are of K
models, and a bundle has one. Two ways lead from them to new images:

- Score a new image by all K models, and compare each score with those of the model's fold: cross-conformal
  prediction (Vovk 2015), CV+ and jackknife+ (Barber, Candès, Ramdas and Tibshirani 2021; for classes Romano,
  Sesia and Candès 2020). For any models, a promise of 1 - a holds with 1 - 2a: 80 % for 90 %. Each
  image costs K models.
- Fit thresholds on the pooled answers, and apply them to another model: the jackknife of Barber et al., and
  for calibration `CalibratedClassifierCV(ensemble=False)` of scikit-learn. It costs one model. It has no
  guarantee without an assumption: that model answers images of new groups as the K models do. If it is more
  accurate, sets are larger, and fewer images are answered, than the promise needs.

scalp does the second: a bundle costs one model, and the test of the referral rule needs one rule. The
assumption is checked on the validation split, of which neither the deployed model nor the models of these
answers have seen the images (`list_worse`). Temperature and biases of the deployed model are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scalp_core.bundles.contract import BundleSpec
from scalp_core.evaluation.paired import LOWER_IS_BETTER, Answers, compare_answers
from scalp_core.evaluation.subgroups import is_in_set
from scalp_core.evaluation.targets import Kind
from scalp_core.grades import NUM_GRADES
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference import calibration
from scalp_core.inference.decision import make_gradings
from scalp_core.inference.fitting import fit_flagged_decision

TEACHERS_SHARE = 0.5
"""Share of the teachers' probabilities in a soft label; the rest is the grade."""

_PROMISED = ("coverage", "wrong_among_answered")


class OutOfFold(NamedTuple):
    """Out-of-fold answers to labeled images.

    Args:
        logits: float (N, 4), finite, of the model that was not trained on the image.
        flagged: bool (N,), whether a gate of that model's bundle refers the image.
        labels: int (N,), true grades.
        groups: (N,), group of each image; a group is in one fold.
        folds: int (N,), fold of each image.
    """

    logits: np.ndarray
    flagged: np.ndarray
    labels: np.ndarray
    groups: Sequence[Any]
    folds: np.ndarray

    def take(self, inside: np.ndarray) -> OutOfFold:
        """Select the images of a mask, bool (N,)."""
        groups = [self.groups[place] for place in np.flatnonzero(inside).tolist()]
        return OutOfFold(
            self.logits[inside], self.flagged[inside], self.labels[inside], groups, self.folds[inside]
        )


class Promises(NamedTuple):
    """Promises that a decision is fitted to keep: arguments of `fitting.fit_decision`."""

    coverage: float
    targets: Mapping[Kind, float]
    prior_moved: bool


def fit_decision_out_of_fold(spec: BundleSpec, answers: OutOfFold, promises: Promises) -> BundleSpec:
    """Return the contract with the decision fitted on all out-of-fold answers, and without gates.

    Args:
        spec: Contract of any of the K bundles.
        answers: Out-of-fold answers.
        promises: Coverage and targets.
    """
    return fit_flagged_decision(
        spec.model_copy(update={"gates": None}),
        answers.logits, answers.flagged, answers.labels, answers.groups, **promises._asdict(),
    )  # fmt: skip


def cross_validate(spec: BundleSpec, answers: OutOfFold, promises: Promises) -> tuple[np.ndarray, Answers]:
    """Answer the images of each fold by the decision that is fitted on the other folds.

    Neither model nor calibration, grade sets and referral rule of an image's answer have seen its group.

    Returns:
        Calibrated probabilities, float (N, 4), and the answers.
    """
    probs = np.empty(answers.logits.shape)
    covered, refer = np.zeros(len(answers.labels), bool), np.zeros(len(answers.labels), bool)
    for fold in np.unique(answers.folds):
        inside = answers.folds == fold
        fitted = fit_decision_out_of_fold(spec, answers.take(~inside), promises)
        probs[inside], (_, covered[inside], refer[inside]) = answer(fitted, answers.take(inside))
    return probs, Answers(probs.argmax(axis=1), covered, refer)


def answer(spec: BundleSpec, images: OutOfFold) -> tuple[np.ndarray, Answers]:
    """Apply a fitted decision to logits and flags; return probabilities and answers as `cross_validate`."""
    spec = spec.model_copy(update={"gates": None})  # the flags are theirs
    gradings = make_gradings(images.logits, np.zeros((len(images.labels), len(STATISTICS))), spec)
    sets = [grading.grade_set for grading in gradings]
    refer = np.array([grading.refer for grading in gradings], bool) | images.flagged
    probs = calibration.calibrated(images.logits, spec)
    return probs, Answers(probs.argmax(axis=1), is_in_set(images.labels, sets), refer)


def mix_labels(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Mix grades int (N,) with out-of-fold probabilities (N, 4): soft labels of a student, float32 (N, 4)."""
    grades = np.eye(NUM_GRADES)[labels]
    return ((1 - TEACHERS_SHARE) * grades + TEACHERS_SHARE * probs).astype(np.float32)


def with_rules(spec: BundleSpec, fitted: BundleSpec) -> BundleSpec:
    """Return a contract with grade sets and referral rule of another one, and with its own calibration."""
    return spec.model_copy(update={"conformal": fitted.conformal, "referral": fitted.referral})


def list_worse(
    labels: np.ndarray, out_of_fold: Answers, deployed: Answers, groups: Sequence[Any]
) -> list[str]:
    """List the promises that a model keeps worse than out-of-fold answers do, by the same rules.

    Args:
        labels: int (N,), true grades of images that no model was trained on.
        out_of_fold: Answers of the K models.
        deployed: Answers of the deployed model.
        groups: (N,), group of each image.

    Returns:
        Names of `paired.METRICS` whose interval of the paired difference is on the worse side of 0.
    """
    (differences,) = compare_answers(labels, [out_of_fold, deployed], groups)["differences"]
    return [
        name
        for name in _PROMISED
        if differences[name]["contains_zero"] is False
        and (differences[name]["difference"] > 0) == (name in LOWER_IS_BETTER)
    ]
