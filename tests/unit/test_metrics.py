import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from scalp_core import metrics


def test_kappa_from_counts_equals_kappa_from_labels():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 500, p=[0.05, 0.35, 0.43, 0.17])
    grades = np.clip(labels + rng.integers(-1, 2, 500), 0, 3)
    expected = cohen_kappa_score(labels, grades, weights="quadratic")
    assert metrics.score(labels, grades)["qwk"] == pytest.approx(expected)


def test_kappa_of_perfect_reversed_and_constant_answers():
    labels = np.array([0, 1, 2, 3] * 10)
    assert metrics.score(labels, labels)["qwk"] == 1
    assert metrics.score(labels, 3 - labels)["qwk"] == -1
    assert metrics.score(labels, np.full(40, 2))["qwk"] == 0
    assert metrics.score(np.full(4, 2), np.full(4, 2))["qwk"] == 0


def test_far_misses_cost_more_than_near_ones():
    labels = np.array([0, 1, 2, 3] * 10)
    near, far = labels.copy(), labels.copy()
    near[0], far[0] = 1, 3
    assert metrics.score(labels, near)["qwk"] > metrics.score(labels, far)["qwk"]
    assert metrics.score(labels, near)["mae"] == pytest.approx(1 / 40)
    assert metrics.score(labels, far)["mae"] == pytest.approx(3 / 40)


def test_recall_precision_and_confusion_of_a_small_case():
    result = metrics.score(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]))
    assert result["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert result["recall"] == [0.5, 1, 1, 0]
    assert result["precision"] == [1, 0.5, 1, 0]
    assert result["support"] == [2, 1, 1, 0]
    assert result["top1"] == 0.75
    # Over the three grades that occur: 2/3, 2/3, 1.
    assert result["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_the_majority_baseline_knows_only_the_commonest_grade():
    labels = np.array([2] * 43 + [1] * 35 + [3] * 18 + [0] * 4)
    baseline = metrics.majority_baseline(labels, 2)
    assert baseline["top1"] == 0.43
    assert baseline["qwk"] == 0
