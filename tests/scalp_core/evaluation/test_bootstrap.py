import json

import numpy as np
import pytest

from scalp_core.evaluation import bootstrap, metrics
from tests.scalp_core.evaluation.test_metrics import drawn


def width(bound):
    return bound["high"] - bound["low"]


def test_correlated_groups_widen_intervals():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 25)
    labels = rng.choice(4, 500, p=[0.1, 0.3, 0.4, 0.2])
    right = (rng.random(20) < 0.6)[groups]  # whole microscopes are right or wrong
    probs = np.full((500, 4), 0.1)
    probs[np.arange(500), np.where(right, labels, 3 - labels)] = 0.7
    by_group = bootstrap.bootstrap_metrics(labels, probs, groups)
    by_row = bootstrap.bootstrap_metrics(labels, probs, np.arange(500))
    for name in ("qwk", "top1", "mae", "rps", "log_loss", "ece", "auroc", "balanced_accuracy"):
        assert width(by_group[name]) > 2 * width(by_row[name]), name
    # Each microscope counts once, so that this is the standard error of a share of 20.
    error = np.sqrt(right.mean() * (1 - right.mean()) / 20)
    assert width(by_group["top1"]) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_intervals_depend_on_the_seed():
    labels, probs = drawn()
    groups = np.arange(500) % 30
    first = bootstrap.bootstrap_metrics(labels, probs, groups)
    assert json.dumps(first) == json.dumps(bootstrap.bootstrap_metrics(labels, probs, groups))
    assert first != bootstrap.bootstrap_metrics(labels, probs, groups, seed=1)
    shuffled = np.random.default_rng(0).permutation(500)
    again = bootstrap.bootstrap_metrics(labels[shuffled], probs[shuffled], groups[shuffled])
    for name in ("qwk", "auroc", "ece", "log_loss"):
        assert again[name]["low"] == pytest.approx(first[name]["low"]), name


def test_resample_has_the_metrics_of_its_images(monkeypatch):
    labels, probs = drawn(200)
    groups = np.arange(200) % 10  # one digit: as text they are in the order of the weights
    weights = next(bootstrap.resamples(10, 200, seed=3))[:1]
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1)
    monkeypatch.setattr(bootstrap, "resamples", lambda *_: iter([weights]))
    rows = np.repeat(np.arange(200), weights[0].astype(int)[groups])
    expected = metrics.score(labels[rows], probs[rows].argmax(axis=1))
    expected |= metrics.score_probabilities(labels[rows], probs[rows])
    found = bootstrap.bootstrap_metrics(labels, probs, groups)
    for name in set(expected) - {"n", "support", "confusion", "ece_if_calibrated", "ece_if_calibrated_95"}:
        bounds = found[name] if isinstance(found[name], list) else [found[name]]
        values = expected[name] if isinstance(expected[name], list) else [expected[name]]
        assert [bound["low"] for bound in bounds] == pytest.approx(values), name


def test_resamples_without_a_grade_are_left_out_and_counted():
    # The one group with a grade 3 is absent from about 1 / e of the resamples.
    labels = np.array([1, 2] * 10 + [3])
    probs = np.full((21, 4), 0.1)
    probs[np.arange(21), labels] = 0.7
    found = bootstrap.bootstrap_metrics(labels, probs, np.arange(21))
    assert found["recall"][0] is None
    assert found["recall"][3]["undefined"] == pytest.approx(1000 / np.e, abs=60)
    assert found["recall"][3]["low"] == found["recall"][3]["high"] == 1
    assert found["qwk"]["undefined"] == 0


def test_a_single_group_has_no_intervals():
    labels, probs = drawn(50)
    found = bootstrap.bootstrap_metrics(labels, probs, ["M01"] * 50)
    assert found["groups"] == 1
    assert found["qwk"] is None
    assert found["recall"] == [None] * 4
    assert bootstrap.bootstrap_grades(labels, labels, ["M01"] * 50)["mae"] is None
