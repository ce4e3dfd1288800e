"""Linear probe: logistic regression on the features of a frozen network, as a baseline of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scalp_core.grades import NUM_GRADES

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse regularization, of standardized features
_DEFAULT_STRENGTH = 1e-2
_HELD_OUT = 0.25  # of the groups, to choose the regularization
_ITERATIONS = 300


def predict_linear_probe(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[Any], others: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Fit a logistic regression to features, and predict the grades of other images.

    Args:
        features: float (N, D), of training images with at least two different labels.
        labels: int (N,), 0..3.
        groups: (N,), group of each image; the regularization is chosen on held-out groups.
        others: float (M, D), features of the images to grade.
        seed: Random seed of the held-out groups.

    Returns:
        Probabilities (M, 4), and the inverse regularization strength.
    """
    from sklearn.model_selection import GroupShuffleSplit

    strength = _DEFAULT_STRENGTH
    if len(set(groups)) > 1:
        splitter = GroupShuffleSplit(1, test_size=_HELD_OUT, random_state=seed)
        fit, held_out = next(splitter.split(features, labels, groups))
        if len(np.unique(labels[fit])) > 1:
            scores = {
                each: _fit(features[fit], labels[fit], each).score(features[held_out], labels[held_out])
                for each in _STRENGTHS
            }
            strength = max(_STRENGTHS, key=scores.__getitem__)  # of equal ones the strongest regularization
    model = _fit(features, labels, strength)
    probs = np.zeros((len(others), NUM_GRADES))
    probs[:, model.classes_] = model.predict_proba(others)
    return probs, strength


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS)).fit(
        features, labels
    )
