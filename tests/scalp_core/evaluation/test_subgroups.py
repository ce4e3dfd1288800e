import io

import numpy as np
import pytest
from PIL import Image

from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.evaluation import figures, metrics, subgroups
from scalp_core.inference import calibration
from tests.scalp_core.evaluation.test_metrics import drawn
from tests.support.small_grade import write_bundle


def test_slices_contain_each_image_once_and_pool_small_values():
    labels, probs = drawn(200)
    device = [f"M{index % 4}" for index in range(150)] + [f"X{index % 10}" for index in range(50)]
    position = [None if index < 30 else "TH" for index in range(190)] + ["LH"] * 10
    found = subgroups.score_slices(
        labels, probs.argmax(axis=1), device, {"device": device, "position": position}
    )
    assert [row["value"] for row in found["device"]] == ["M0", "M1", "M2", "M3", "10 values of under 20"]
    assert found["device"][-1]["pooled"] == found["device"][-1]["groups"] == 10
    assert [row["value"] for row in found["position"]] == ["LH", "TH", "unknown"]
    assert [row["small"] for row in found["position"]] == [True, False, False]
    few = subgroups.score_slices(labels[:20], labels[:20], device[:20], {"sex": ["male", "female"] * 10})[
        "sex"
    ]
    assert [(row["value"], row["n"], row["small"]) for row in few] == [
        ("female", 10, True),
        ("male", 10, True),
    ]
    for rows in found.values():
        assert sum(row["n"] for row in rows) == 200
    assert found["device"][0]["intervals"]["qwk"] is None  # one microscope is one group
    bound = found["position"][1]["intervals"]["qwk"]
    assert bound["low"] < found["position"][1]["qwk"] < bound["high"]


def test_conformal_coverage_by_hand():
    grade_sets = subgroups.measure_grade_sets(np.array([0, 0, 2]), [[0], [1, 2], [1, 2, 3]], 0.9)
    assert grade_sets["coverage"] == pytest.approx(2 / 3)
    assert grade_sets["mean_set_size"] == 2
    assert grade_sets["sizes"] == [1, 1, 1, 0]
    assert grade_sets["by_grade"][0] == {"coverage": 0.5, "mean_set_size": 1.5}
    assert grade_sets["by_grade"][1] == {"coverage": None, "mean_set_size": None}


def test_risk_and_coverage_by_hand():
    # Right, right, one off, two off; in the order of confidence.
    probs = np.array([[0.9, 0.1, 0, 0], [0, 0.8, 0.2, 0], [0, 0.7, 0.3, 0], [0.6, 0.4, 0, 0]])
    labels, refer = np.array([0, 1, 2, 2]), np.array([False, False, False, True])
    curve = subgroups.measure_risk_coverage(labels, probs, refer)
    assert curve["curve"]["coverage"] == [0.25, 0.5, 0.75, 1]
    assert curve["curve"]["error"] == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert curve["curve"]["mae"] == pytest.approx([0, 0, 1 / 3, 3 / 4])
    assert curve["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert curve["referral"] == pytest.approx({"coverage": 0.75, "error": 1 / 3, "mae": 1 / 3})
    assert subgroups.measure_risk_coverage(labels, probs, ~refer | refer)["referral"]["error"] is None


def test_order_of_equally_confident_images_is_irrelevant():
    probs = np.tile([0.7, 0.3, 0.0, 0.0], (10, 1))
    labels = np.array([0] * 5 + [1] * 5)
    curve = subgroups.measure_risk_coverage(labels, probs, np.zeros(10, bool))
    assert curve["curve"]["error"] == pytest.approx([0.5] * 10)


def test_the_mean_of_passes_is_of_calibrated_probabilities(tmp_path):
    logits = np.random.default_rng(0).normal(0, 3, (8, 5, 4)).astype(np.float32)
    for bias in (None, (0.5, -1.0, 0.25, 0.25)):
        spec = load_bundle(write_bundle(str(tmp_path), temperature=1.7, bias=bias)).spec
        expected = calibration.calibrated(logits.reshape(-1, 4), spec).reshape(8, 5, 4).mean(axis=0)
        found = calibration.calibrated(calibration.mean_logits(logits, spec), spec)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ece_is_reported_next_to_ece_by_chance(tmp_path):
    labels, probs = drawn(200)
    found = subgroups.validation_metrics(
        labels, probs**2 / (probs**2).sum(axis=1)[:, None], probs, range(200), {}
    )
    calibrated, chance = found["calibration"], metrics.ece_if_calibrated(probs)
    assert calibrated["if_calibrated_after"] == chance
    assert (found["ece_if_calibrated"], found["ece_if_calibrated_95"]) == (chance["mean"], chance["high"])
    line = subgroups.ece_line(calibrated, "after")
    assert line.startswith(
        f"{found['ece']:.3f} ({chance['mean']:.3f} expected of a perfectly calibrated model"
    )
    assert f"up to {chance['high']:.3f}" in line
    assert calibrated["if_calibrated_before"] != chance
    assert subgroups.ece_line(subgroups.measure_calibration(labels, probs, None), "before") == "-"
    spec = load_bundle(write_bundle(str(tmp_path))).spec
    training = spec.training.model_copy(update={"recipe": {"epochs": 1}})
    spec = spec.model_copy(update={"training": training})
    card = render_model_card(spec.model_copy(update={"metrics": {"val": found}}))
    assert (
        f"{found['ece']:.3f} with it).\nA perfectly calibrated model has an ECE of {chance['mean']:.3f}"
        in card
    )
    del calibrated["if_calibrated_after"]  # as in an older bundle
    assert "ECE" not in render_model_card(spec.model_copy(update={"metrics": {"val": found}}))


def test_plots_accept_undefined_metrics():
    labels, probs = np.full(30, 2), np.tile([0.0, 0.0, 1.0, 0.0], (30, 1))
    validation = subgroups.validation_metrics(labels, probs, probs, ["a"] * 30, {"sex": [None] * 30})
    calibrated = subgroups.measure_calibration(labels, probs, None)
    refer = np.ones(30, bool)
    for picture in (
        figures.plot_reliability(calibrated, "one grade"),
        figures.plot_risk_coverage(subgroups.measure_risk_coverage(labels, probs, refer), "one grade"),
        figures.plot_slices(validation["slices"], validation, validation["intervals"], "one grade"),
    ):
        assert Image.open(io.BytesIO(picture)).size[0] > 400
