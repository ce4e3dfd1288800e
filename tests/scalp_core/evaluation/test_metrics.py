from itertools import product

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    precision_score,
    roc_auc_score,
)

from scalp_core.evaluation import metrics


def drawn(count=500, seed=0):
    """Labels and correlated probabilities, with ties."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, count, p=[0.05, 0.35, 0.43, 0.17])
    logits = -((np.arange(4) - (labels + rng.normal(0, 0.9, count))[:, None]) ** 2)
    probs = np.exp(logits).round(2) + 0.01
    return labels, probs / probs.sum(axis=1, keepdims=True)


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
    assert metrics.score(np.full(4, 2), np.full(4, 2))["qwk"] is None


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
    assert result["recall"] == [0.5, 1, 1, None]
    assert result["precision"] == [1, 0.5, 1, None]
    assert result["support"] == [2, 1, 1, 0]
    assert result["top1"] == 0.75
    # Over the three grades that occur: 2/3, 2/3, 1.
    assert result["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_the_majority_baseline_knows_only_the_commonest_grade():
    labels = np.array([2] * 43 + [1] * 35 + [3] * 18 + [0] * 4)
    baseline = metrics.majority_baseline(labels, 2)
    assert baseline["top1"] == 0.43
    assert baseline["qwk"] == 0


def test_many_matrices_at_once_give_what_each_gives_alone():
    cases = [drawn(count, seed) for seed, count in enumerate([400, 30, 6, 1])]
    cases.append((np.full(5, 2), np.eye(4)[[2] * 5]))
    cases = [(labels, probs.argmax(axis=1)) for labels, probs in cases]
    together = metrics.score_confusion(np.stack([metrics.confusion(*case) for case in cases]).astype(float))
    for index, (labels, grades) in enumerate(cases):
        alone = metrics.score(labels, grades)
        for name, values in together.items():
            expected = np.array(alone[name], dtype=float)  # None becomes NaN
            np.testing.assert_allclose(values[index], expected, err_msg=name)


def test_averages_over_grades_equal_scikit_learn():
    labels, probs = drawn()
    grades = probs.argmax(axis=1)
    result = metrics.score(labels, grades)
    assert result["macro_f1"] == pytest.approx(f1_score(labels, grades, average="macro"))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, grades))
    errors = [np.abs(grades - labels)[labels == grade].mean() for grade in range(4)]
    assert result["mae_macro"] == pytest.approx(np.mean(errors))
    assert result["within1"] == np.mean(np.abs(labels - grades) < 2)


def test_precision_and_auroc_equal_scikit_learn():
    labels, probs = drawn()
    positive, severity = labels >= 2, probs[:, 2:].sum(axis=1)
    result = metrics.score(labels, probs.argmax(axis=1))
    assert result["precision"] == pytest.approx(precision_score(labels, probs.argmax(axis=1), average=None))
    weights = np.random.default_rng(0).integers(0, 4, (3, 500)).astype(float)
    weighted = metrics.score_referable(positive, severity, weights)["auroc"]
    assert weighted == pytest.approx(
        [roc_auc_score(positive, severity, sample_weight=row) for row in weights]
    )
    assert metrics.score_probabilities(labels, probs)["auroc"] == pytest.approx(
        roc_auc_score(positive, severity)
    )


def test_log_loss_equals_cross_entropy_and_rps_the_mean_of_three_brier_scores():
    labels, probs = drawn()
    result = metrics.score_probabilities(labels, probs)
    expected = torch.nn.functional.nll_loss(torch.from_numpy(np.log(probs)), torch.from_numpy(labels))
    assert result["log_loss"] == pytest.approx(float(expected))
    scores = [brier_score_loss(labels <= step, probs[:, : step + 1].sum(axis=1)) for step in range(3)]
    assert result["rps"] == pytest.approx(np.mean(scores))


def test_rps_costs_distance():
    sure = np.eye(4)
    assert metrics.ranked_probability_scores(np.zeros(4, int), sure).tolist() == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


def test_ece_by_hand():
    # Two photographs at 0.7, one right: 0.2 off. Two at 0.9, both right: 0.1 off.
    probs = np.array([[0.7, 0.1, 0.1, 0.1]] * 2 + [[0.9, 0.1, 0, 0]] * 2)
    labels = np.array([0, 1, 0, 0])
    assert metrics.expected_calibration_error(labels, probs) == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    filled = [row for row in metrics.reliability(labels, probs) if row["n"]]
    assert [(row["n"], row["top1"]) for row in filled] == [(2, 0.5), (2, 1.0)]
    assert metrics.reliability(labels, probs)[0]["top1"] is None


def spread(count, sharpness=1.0, seed=0):
    """Probabilities of a model with this sharpness."""
    exponentials = np.exp(np.random.default_rng(seed).normal(0, sharpness, (count, 4)))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def labels_from(probs, seed=0):
    """Labels for which these probabilities are perfectly calibrated."""
    drawn = np.random.default_rng(seed).random((len(probs), 1))
    return (drawn > np.cumsum(probs, axis=1)[:, :-1]).sum(axis=1)


def test_the_ece_of_chance_is_the_mean_over_all_outcomes():
    probs = spread(9)
    confidence, bins = probs.max(axis=1), metrics.confidence_bins(probs)
    mean = 0.0
    for right in map(np.array, product([0, 1], repeat=9)):
        gaps = np.bincount(bins, confidence - right)
        mean += np.where(right, confidence, 1 - confidence).prod() * np.abs(gaps).sum() / 9
    assert metrics.ece_if_calibrated(probs)["mean"] == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(("count", "ece"), [(81, 0.124), (195, 0.079), (458, 0.051), (1272, 0.031)])
def test_a_perfectly_calibrated_model_has_the_ece_of_chance(count, ece):
    probs = spread(count)
    chance = metrics.ece_if_calibrated(probs)
    assert chance["mean"] == pytest.approx(ece, rel=0.05)
    draws = [metrics.expected_calibration_error(labels_from(probs, seed), probs) for seed in range(300)]
    assert np.mean(draws) == pytest.approx(chance["mean"], rel=0.05)
    assert np.mean(np.array(draws) <= chance["high"]) == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_over_and_underconfident_models_have_a_larger_ece(factor):
    probs = spread(458, sharpness=1.5)
    sharpened = probs**factor / (probs**factor).sum(axis=1, keepdims=True)
    result = metrics.score_probabilities(labels_from(probs), sharpened)
    assert result["ece"] > 1.5 * result["ece_if_calibrated_95"] > 1.5 * result["ece_if_calibrated"]
    calm = metrics.score_probabilities(labels_from(probs), probs)
    assert calm["ece"] < calm["ece_if_calibrated_95"]


def test_the_ece_of_chance_depends_on_the_confidences_alone(monkeypatch):
    probs = spread(195)
    chance = metrics.ece_if_calibrated(probs)
    rng = np.random.default_rng(1)
    assert metrics.ece_if_calibrated(rng.permutation(probs)) == chance
    assert metrics.ece_if_calibrated(probs[:, ::-1]) == chance
    monkeypatch.setattr(metrics, "_ECE_CHUNK_CELLS", 5_000)
    assert metrics.ece_if_calibrated(probs) == pytest.approx(chance)
    assert metrics.ece_if_calibrated(np.eye(4)[[0, 1, 2]]) == {"mean": 0, "high": 0}  # sure is right


def test_sensitivity_at_95_specificity_by_hand():
    # 20 below grade 2, one of them with a high score: it may be missed, and no other may.
    severity = np.array([0.1] * 19 + [0.8] + [0.9, 0.7, 0.05, 0.1])
    labels = np.array([0] * 20 + [2, 3, 2, 3])
    probs = np.column_stack([1 - severity, severity * 0, severity, severity * 0])
    result = metrics.score_probabilities(labels, probs)
    assert result["sensitivity_at_95_specificity"] == 0.5
    # Above 19 or 20 of 20, below all, and equal to 19: of 80 pairs.
    assert result["auroc"] == pytest.approx((20 + 19 + 0 + 19 / 2) / 80)


def test_undefined_metrics_are_none():
    labels, probs = np.array([2, 3]), np.eye(4)[[2, 2]]
    result = metrics.score_probabilities(labels, probs)
    assert result["auroc"] is None
    assert result["sensitivity_at_95_specificity"] is None
    assert result["log_loss"] is None  # infinite: the second was ruled out
    assert metrics.score(labels, np.array([2, 2]))["recall"] == [None, None, 1, 0]
    assert metrics.score(labels, np.array([2, 2]))["precision"] == [None, None, 0.5, None]


def test_prior_baseline_equals_the_mean_of_draws():
    labels = np.repeat(np.arange(4), [40, 350, 430, 180])
    counts = [1, 3, 4, 2]
    baseline = metrics.prior_baseline(labels, counts)
    drawing = np.random.default_rng(0).choice(4, (300, 1000), p=[0.1, 0.3, 0.4, 0.2])
    draws = [metrics.score(labels, grades) for grades in drawing]
    for name in ("top1", "within1", "qwk", "mae", "mae_macro", "balanced_accuracy"):
        assert baseline[name] == pytest.approx(np.mean([draw[name] for draw in draws]), abs=0.01), name
    assert baseline["log_loss"] == pytest.approx(-np.mean(np.log(np.array([0.1, 0.3, 0.4, 0.2])[labels])))
    assert baseline["auroc"] == 0.5


def test_papers_binary_accuracy_is_too_optimistic_as_noted():
    labels = np.array([0, 1, 2, 3] * 25)
    assert metrics.binary_accuracy(labels, np.eye(4)[labels]) == 1
    assert metrics.binary_accuracy(labels, np.eye(4)[3 - labels]) == 0.5
    assert metrics.binary_accuracy(labels, np.full((100, 4), 0.25)) == 0.75
    # Precision and recall give it: FN = 1 - R and FP = R (1 / P - 1), of N.
    for precision, recall, reported in ((0.6945, 0.6862, 0.8461), (0.9108, 0.9082, 0.9548)):
        wrong = (1 - recall) + recall * (1 / precision - 1)
        assert 1 - wrong / 4 == pytest.approx(reported, abs=1e-4)
        assert f"{reported:.2%}".replace("%", " %") in metrics.PAPER_NOTE
