"""Confident learning finds planted errors among labels."""

import numpy as np

from scalp_core.evaluation.label_errors import find_label_errors


def draw(rng, count=2000, errors=0.05, sharpness=3.0):
    """Labels with planted errors, the mask of these, the true grades, and probabilities of a fair model."""
    truth = rng.choice(4, size=count, p=[0.1, 0.4, 0.3, 0.2])
    logits = rng.normal(size=(count, 4))
    logits[np.arange(count), truth] += sharpness
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    planted = rng.random(count) < errors
    labels = np.where(planted, (truth + rng.integers(1, 4, size=count)) % 4, truth)
    return labels, planted, truth, probs


def test_planted_errors_are_listed_first_with_their_grade():
    labels, planted, truth, probs = draw(np.random.default_rng(0))
    order, suggested, margins = find_label_errors(labels, probs)
    assert (np.diff(margins) >= 0).all()
    assert planted[order[:50]].mean() > 0.9
    assert planted[order].sum() > 0.5 * planted.sum()
    assert (suggested != labels[order]).all()
    found = planted[order]
    assert (suggested[found] == truth[order][found]).mean() > 0.9


def test_a_grade_that_a_model_always_doubts_is_not_suspect():
    """Grade 3 never has more than 0.4, as of a model of a rare grade: its own mean is its threshold."""
    labels = np.repeat([0, 3], 50)
    probs = np.where(labels[:, None] == 0, [0.9, 0.05, 0.03, 0.02], [0.5, 0.05, 0.05, 0.4])
    assert find_label_errors(labels, probs)[0].size == 0


def test_right_labels_of_a_sure_model_are_not_suspect():
    labels = np.arange(4).repeat(5)
    assert find_label_errors(labels, np.eye(4)[labels])[0].size == 0
