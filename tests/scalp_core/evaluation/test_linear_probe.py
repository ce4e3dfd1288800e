"""The linear probe: logistic regression, regularized by what generalizes to other microscopes."""

import numpy as np

from scalp_core.evaluation.linear_probe import predict_linear_probe


def draw(rng, count, groups, signal=2.0, nuisance=0.0):
    labels = rng.integers(3, size=count)  # no image is severe
    group = rng.integers(groups, size=count)
    features = rng.normal(size=(count, 30))
    features[:, 0] += signal * labels
    features[:, 1:] += nuisance * rng.normal(size=(groups, 29))[group]
    return features, labels, group.tolist()


def test_it_grades_by_features_that_tell_the_grade():
    rng = np.random.default_rng(0)
    features, labels, groups = draw(rng, 300, 10)
    others, truth, _ = draw(rng, 300, 10)
    probs, _ = predict_linear_probe(features, labels, groups, others)
    assert np.allclose(probs.sum(axis=1), 1)
    assert (probs[:, 3] == 0).all()
    assert (probs.argmax(axis=1) == truth).mean() > 0.7


def test_labels_that_follow_the_microscope_are_regularized():
    """Labels are chance, alike within a microscope: nothing generalizes to another one."""
    rng = np.random.default_rng(1)
    features, _, groups = draw(rng, 300, 12, nuisance=3.0)
    labels = rng.integers(4, size=12)[groups]
    assert predict_linear_probe(features, labels, groups, features)[1] < 1
    probs, _ = predict_linear_probe(features, labels, [0] * 300, features)  # one group: nothing is held out
    assert (probs.argmax(axis=1) == labels).mean() > 0.9
