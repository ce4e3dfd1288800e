"""What `scalp evaluate` leaves behind: intervals, baselines, slices, pictures, and what it warns of."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.driver import evaluate
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.images import augment
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.storage import read

# The evaluation of `pipeline` ran in Ray.
evaluate_alone = partial(evaluate, executor=LocalExecutor(), probe=False)


@pytest.fixture(scope="module")
def summary(pipeline):
    return json.loads((pipeline.evaluation / "summary.json").read_text())


@pytest.mark.promise("README: evaluation reports intervals and the majority baseline")
def test_every_metric_has_its_interval_and_its_baselines(summary):
    scalars = {name for name, value in summary["metrics"].items() if not isinstance(value, list)} - {"n"}
    assert scalars >= {"qwk", "top1", "within1", "mae_macro", "auroc", "ece", "rps", "log_loss"}
    chance = {"ece_if_calibrated", "ece_if_calibrated_95"}
    assert chance < scalars
    assert scalars - chance <= set(summary["intervals"])
    assert scalars <= set(summary["prior"])
    assert {"qwk", "top1", "mae"} <= set(summary["majority"])
    assert summary["intervals"]["groups"] == summary["groups"] > 1
    for name in ("qwk", "top1", "log_loss"):
        bound = summary["intervals"][name]
        assert bound["low"] <= summary["metrics"][name] <= bound["high"]


def test_the_linear_probe_is_a_baseline_from_the_initial_weights(pipeline, summary):
    probed = summary["linear_probe"]
    train = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "train")
    assert (probed["images"], probed["of"]) == (train.num_rows, train.num_rows)
    assert set(probed["metrics"]) >= set(summary["prior"])
    assert probed["metrics"]["n"] == summary["metrics"]["n"]
    assert probed["initial_weights"] == "none (random)" and probed["seconds"] > 0


def test_it_tells_whom_it_is_worse_for_and_what_referral_buys(pipeline, summary):
    assert set(summary["slices"]) == {"device", "position", "sex", "age"}
    for rows in summary["slices"].values():
        assert sum(row["n"] for row in rows) == summary["metrics"]["n"]
    told = summary["risk_coverage"]
    assert told["referral"]["coverage"] == pytest.approx(1 - summary["referred"])
    assert summary["conformal"]["coverage"] == summary["coverage"]
    assert len(summary["conformal"]["by_grade"]) == 4
    assert summary["calibration"]["ece_after"] == summary["metrics"]["ece"]
    assert summary["calibration"]["ece_before"] is not None
    chance = summary["calibration"]["if_calibrated_after"]
    assert 0 < summary["metrics"]["ece_if_calibrated"] == chance["mean"] < chance["high"]
    assert 0.5 < summary["paper"]["binary_accuracy"] <= 1
    for name in ("confusion", "reliability", "risk_coverage", "slices"):
        with Image.open(pipeline.evaluation / f"{name}.png") as picture:
            assert picture.size[0] > 400
    assert {"grade_set", "refer"} <= set(pq.read_schema(pipeline.evaluation / "predictions.parquet").names)


def test_the_bundle_and_its_card_carry_intervals_and_calibration(pipeline):
    bundle = pipeline.run / "bundle"
    val = load_bundle(str(bundle)).spec.metrics["val"]
    assert val["intervals"]["qwk"]["low"] <= val["qwk"] <= val["intervals"]["qwk"]["high"]
    told = val["calibration"]
    names = {f"{name}_{when}" for name in ("ece", "if_calibrated") for when in ("before", "after")}
    assert set(told) == {"bins", *names}
    assert set(val["slices"]) == {"position", "sex", "age"}  # microscopes are not named in what is handed on
    card = (bundle / "MODEL_CARD.md").read_text()
    bound = val["intervals"]["qwk"]
    assert f"| {val['qwk']:.3f} | {bound['low']:.3f} to {bound['high']:.3f} |" in card
    assert f"ECE {told['ece_before']:.3f} without it" in card
    assert f"has an ECE of {told['if_calibrated_after']['mean']:.3f}" in card
    assert f"- validation figures computed by {val['computed_by']}" in card
    assert "| sex female |" in card
    assert "## Limits" in card


def test_it_records_what_computed_it_and_that_the_images_are_synthetic(pipeline, summary):
    how = summary["computation"]
    assert how["device"] == "cpu" and "auto" not in how.values()
    assert {"scalp", "openvino"} < set(how["versions"])
    assert summary["computed_by"].startswith(f"cpu {how['precision']} openvino {how['versions']['openvino']}")
    assert load_bundle(str(pipeline.run)).spec.metrics["val"]["computed_by"] == summary["computed_by"]
    assert summary["synthetic"]
    model, data, *_ = summary["warnings"]
    assert model == "the model was trained on synthetic images; not for clinical use"
    assert data.startswith("SYNTHETIC IMAGES")


def test_a_part_that_training_saw_is_told(pipeline, summary, tmp_path, capsys):
    assert summary["trained_on"]["same_data"]
    assert summary["trained_on"]["warning"] is None
    seen = evaluate_alone(str(pipeline.run), str(pipeline.data), str(tmp_path), "val")
    assert "were chosen on this split" in seen["trained_on"]["warning"]
    assert seen["linear_probe"] == {"metrics": None, "note": "--no-probe"}
    said = capsys.readouterr().out
    assert "SEEN IN TRAINING" in said and "SYNTHETIC IMAGES" in said and seen["computed_by"] in said
    assert f"({seen['metrics']['ece_if_calibrated']:.3f} expected" in said  # the table folds the rest


def test_tta_is_the_mean_over_four_flips_of_squashed_images_and_its_cost_is_told(pipeline, summary, tmp_path):
    run, data, options = str(pipeline.run), str(pipeline.data), ModelOptions("cpu", "fp32")
    plain = evaluate_alone(run, data, str(tmp_path / "plain"), options=options)
    turned = evaluate_alone(run, data, str(tmp_path / "turned"), options=replace(options, tta=True))
    assert summary["tta"] is None
    without = turned["tta"]["metrics_without"]
    assert without["log_loss"] == pytest.approx(plain["metrics"]["log_loss"], abs=1e-5)
    assert turned["tta"]["passes"] == 4
    assert 0 < turned["tta"]["photographs_per_second"] < turned["tta"]["photographs_per_second_without"]
    assert "fitted without" in turned["tta"]["note"]
    bundle = load_bundle(str(pipeline.run))
    row = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "test").slice(0, 1).to_pylist()[0]
    pixels = decode(read(row["uri"]), bundle.spec.preprocess).pixels
    views = augment.apply_dihedral(np.stack([pixels] * 4), augment.symmetries(turns=False))
    expected = np.mean([each.probabilities for each in Predictor(bundle, "cpu", "fp32").grade(views)], axis=0)
    rows = pq.read_table(tmp_path / "turned" / "predictions.parquet").to_pylist()
    found = next(each for each in rows if each["image_id"] == row["image_id"])
    assert found["probabilities"] == pytest.approx(expected, abs=1e-4)
