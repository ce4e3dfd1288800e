"""`scalp calibrate`: a new bundle for a clinic's images, and the images that it refuses."""

import numpy as np
import pytest

from jobs.common.console import read_json
from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.evaluate.driver import evaluate
from jobs.models.calibrate import calibrate
from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.synthetic.plan import SynthOptions
from tests.support.images import jpeg
from tests.support.plots import leave_undrawn
from tests.support.sources import write_small_set

CPU = ModelOptions(device="cpu", precision="fp32")


def prepared(folder, images: int) -> str:
    write_small_set(folder / "set", SynthOptions(images=images, seed=6, devices=12))
    prepare(str(folder / "set"), str(folder / "data"), executor=LocalExecutor(2))
    return str(folder / "data")


@pytest.fixture(autouse=True)
def _undrawn_plots(monkeypatch):
    leave_undrawn(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("clinic"), 120)


@pytest.fixture(scope="module")
def calibrated(bundle, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "clinic-7"
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    summary = calibrate(
        str(bundle), data, str(out), "wrong<=10%,found>=90%", options=CPU, executor=LocalExecutor(2)
    )
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    return out, summary


def test_the_new_bundle_has_the_same_weights_and_its_own_decision(bundle, data, calibrated):
    out, summary = calibrated
    before, after = load_bundle(str(bundle)).spec, load_bundle(str(out)).spec
    assert after.weights_sha256 == before.weights_sha256
    assert after.graphs == before.graphs
    assert after.model_version.startswith("clinic-7-")
    assert (after.calibrated_on.images, after.calibrated_on.groups) == (120, summary["groups"])
    assert after.calibrated_on.model_version == before.model_version
    assert len(after.bias) == len(after.conformal.thresholds) == 4
    assert after.conformal.groups == summary["groups"] > 5
    assert [target.kind for target in after.referral.targets] == ["wrong", "found"]
    assert after.gates.photographs > 100
    assert np.sum(after.metrics["calibration"]["confusion"]) == 120
    assert read_json(f"{out}/summary.json") == summary


def test_its_answers_and_its_card_are_of_the_new_decision(calibrated, capsys):
    out, _ = calibrated
    bundle = load_bundle(str(out))
    answers = Predictor(bundle, "cpu", "fp32").grade(
        np.stack([decode(jpeg(seed), bundle.spec.preprocess).pixels for seed in range(3)])
    )
    # An untrained model is wrong too often for the target, so each image is referred.
    assert all("low_confidence" in answer.refer_reasons for answer in answers)
    card = (out / "bundle" / "MODEL_CARD.md").read_text()
    assert "fitted again after training, on 120 images" in card
    assert "Referral has the target wrong among answered <= 0.1: not proved" in card


def test_an_evaluation_on_the_same_images_is_marked(calibrated, data, tmp_path, capsys):
    out, _ = calibrated
    summary = evaluate(str(out), data, str(tmp_path / "test"), "train", CPU, LocalExecutor(2))
    assert summary["warnings"][-1].startswith("SEEN IN CALIBRATION")
    assert [target["kind"] for target in summary["targets"]] == ["wrong", "found"]
    assert summary["conformal"]["fitted_groups"] == load_bundle(str(out)).spec.conformal.groups


def test_images_of_the_training_few_images_and_unknown_targets_are_refused(bundle, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--target wrong<5%: 'wrong<5%' is not a target; write wrong<=5%"):
        calibrate(str(bundle), data, str(out), "wrong<5%", executor=LocalExecutor(2))
    with pytest.raises(UserError, match=r"labeled images in split val; at least 100 are needed"):
        calibrate(str(bundle), data, str(out), "wrong<=5%", split="val", executor=LocalExecutor(2))
    loaded = load_bundle(str(bundle))
    training = loaded.spec.training.model_copy(update={"data_sha256": manifest.read_spec(data).sha256})
    trained = tmp_path / "trained"
    save_bundle(str(trained), loaded.spec.model_copy(update={"training": training}), {})
    with pytest.raises(UserError, match=r"is the data that untrained was trained on, .* or --split val"):
        calibrate(str(trained), data, str(out), "wrong<=5%", executor=LocalExecutor(2))
    assert not out.exists()
