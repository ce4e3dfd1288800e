"""How well grades are predicted: ordinal metrics on whole label vectors, each beside its baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score, confusion_matrix, precision_recall_fscore_support

from scalp_core.grades import NUM_GRADES

_LABELS = list(range(NUM_GRADES))


def confusion(labels: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """int (4, 4): rows are the labels, columns the predicted grades."""
    return confusion_matrix(labels, grades, labels=_LABELS)


def quadratic_weighted_kappa(matrix: np.ndarray) -> float:
    """Agreement beyond chance with squared distances; 1 is perfect, 0 is chance.

    A constant prediction is chance by definition; scikit-learn leaves it undefined for constant labels.

    Args:
        matrix: int (4, 4) from `confusion`, of the whole set: kappas of batches do not average to it.
    """
    if np.count_nonzero(matrix) < 2:
        return 0.0
    labels, grades = np.indices(matrix.shape).reshape(2, -1)
    return float(cohen_kappa_score(labels, grades, weights="quadratic", sample_weight=np.ravel(matrix)))


def score(labels: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """The metrics of one set of predictions.

    Args:
        labels: int (N,), 0..3.
        grades: int (N,), predicted, 0..3.
    """
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, grades, labels=_LABELS, zero_division=0
    )
    matrix = confusion(labels, grades)
    # Macro F1 is over the grades that occur; a grade without a photograph has no recall to speak of.
    return {
        "n": len(labels),
        "top1": float(np.mean(labels == grades)),
        "qwk": quadratic_weighted_kappa(matrix),
        "macro_f1": float(f1[support > 0].mean()),
        "mae": float(np.mean(np.abs(labels - grades))),
        "recall": [float(value) for value in recall],
        "precision": [float(value) for value in precision],
        "support": [int(value) for value in support],
        "confusion": matrix.tolist(),
    }


def majority_baseline(labels: np.ndarray, majority: int) -> dict[str, Any]:
    """The metrics of always answering `majority`, the commonest grade of the training data."""
    return score(labels, np.full_like(labels, majority))
