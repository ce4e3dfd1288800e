"""From photographs to grades, really run: the sentences a user would hold us to."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.special import softmax
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.common.images import LoadForTraining, LoadImages
from jobs.common.inference import ModelOptions
from jobs.common.ray_executor import make_dataset
from jobs.evaluate.compare import compare
from jobs.grade.driver import GradeOptions, grade
from jobs.train.driver import train
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import metrics
from scalp_core.images.codecs import read_picture
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.results.schema import RESULTS_FOLDER
from serving import app
from serving.observability.audit_writer import AuditSettings
from serving.replicas.handles import decode_image
from serving.replicas.rollout import is_chosen
from serving.settings import CandidateSettings, Settings
from tests.support import sockets
from tests.support.odd_files import encoded
from tests.support.pipeline import EPOCHS, IMAGES
from tests.support.ports import free_port
from tests.support.result_rows import read_results

SHARE = 0.5  # of the images that the shadow grades too
KINDS = ("PNG", "WEBP", "BMP", "TIFF")  # in addition to the JPEG files of the test split


@pytest.fixture(scope="module")
def test_rows(pipeline):
    return manifest.select_split(manifest.read_manifest(str(pipeline.data)), "test")


@pytest.mark.promise("README: splits share no microscope")
def test_no_device_is_in_two_parts_and_nothing_is_lost(pipeline):
    table = manifest.read_manifest(str(pipeline.data))
    assert table.num_rows + sum(pipeline.prepared["dropped"].values()) == IMAGES
    devices = {part: set(manifest.select_split(table, part)["group"].to_pylist()) for part in manifest.SPLITS}
    assert devices["train"] and devices["val"] and devices["test"]
    assert not devices["train"] & devices["val"]
    assert not (devices["train"] | devices["val"]) & devices["test"]


def test_training_leaves_a_bundle_a_card_and_curves(pipeline):
    spec = load_bundle(str(pipeline.run)).spec
    assert spec.training.workers == 2
    assert (
        spec.gates.photographs
        == manifest.select_split(manifest.read_manifest(str(pipeline.data)), "train").num_rows
    )
    assert spec.training.data_sha256 == manifest.read_spec(str(pipeline.data)).sha256
    assert [entry["epoch"] for entry in pipeline.trained["history"]] == list(range(1, EPOCHS + 1))
    assert "Not a diagnosis" in (pipeline.run / "bundle" / "MODEL_CARD.md").read_text()
    with Image.open(pipeline.run / "curves.png") as curves:
        assert curves.size[0] > 600


def test_training_listens_beyond_loopback_only_as_documented(pipeline):
    assert sockets.exposed(pipeline.listening) == sockets.documented("train") != set()


def test_tensorboard_reads_the_curves_of_the_run(pipeline):
    events = EventAccumulator(str(pipeline.run / "tensorboard")).Reload()
    read = [(each.step, each.value) for each in events.Scalars("qwk/validation")]
    history = pipeline.trained["history"]
    assert read == [(entry["epoch"], pytest.approx(entry["val_qwk"])) for entry in history]
    steps = [each.step for each in events.Scalars("loss/step")]
    assert steps == sorted(set(steps)) and steps[-1] == sum(entry["steps"] for entry in history)
    assert "batch_size: 16" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_without_a_server_to_follow_it_no_training_starts(pipeline, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        train(
            str(pipeline.data),
            str(tmp_path / "run"),
            pipeline.recipe,
            workers=2,
            device="cpu",
            tracking="mlflow",
        )
    assert not (tmp_path / "run" / "run.json").exists()


def test_validation_counts_every_photograph_once_over_both_workers(pipeline):
    rows = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "val").num_rows
    assert {entry["val_n"] for entry in pipeline.trained["history"]} == {rows}
    assert pipeline.trained["validation"]["n"] == rows


def test_the_kept_epoch_is_the_best_by_kappa(pipeline):
    history = pipeline.trained["history"]
    best = max(entry["val_qwk"] for entry in history)
    assert history[pipeline.trained["best_epoch"] - 1]["val_qwk"] == best


@pytest.mark.promise("README: a finished run ends immediately")
def test_a_finished_training_ends_at_once_and_another_recipe_is_refused(pipeline):
    before = (pipeline.run / "bundle" / "model.safetensors").stat().st_mtime_ns
    assert (
        train(str(pipeline.data), str(pipeline.run), pipeline.recipe)["model_version"]
        == pipeline.trained["model_version"]
    )
    assert (pipeline.run / "bundle" / "model.safetensors").stat().st_mtime_ns == before
    other = pipeline.recipe.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(UserError, match="a run with learning_rate 0.001 .now 0.5.; choose another RUN"):
        train(str(pipeline.data), str(pipeline.run), other)


def test_evaluation_is_of_the_whole_test_part_exactly_once(pipeline, test_rows):
    predictions = pq.read_table(pipeline.evaluation / "predictions.parquet")
    assert sorted(predictions["image_id"].to_pylist()) == sorted(test_rows["image_id"].to_pylist())
    labels, grades = (np.array(predictions[name].to_pylist()) for name in ("label", "grade"))
    summary = json.loads((pipeline.evaluation / "summary.json").read_text())
    probs = np.array(predictions["probabilities"].to_pylist())
    assert summary["metrics"] == metrics.score(labels, grades) | metrics.score_probabilities(labels, probs)
    assert summary["metrics"]["n"] == test_rows.num_rows
    majority = load_bundle(str(pipeline.run)).spec.majority_grade
    assert summary["majority"]["top1"] == pytest.approx(np.mean(labels == majority))
    with Image.open(pipeline.evaluation / "confusion.png") as picture:
        assert picture.size[0] > 400


def at_full_size(data, spec):
    """The picture with all its pixels decoded, then resized as always."""
    stored = Image.fromarray(read_picture(data, lambda width, height: (width, height)).pixels)
    return decode(encoded(stored, "BMP"), spec).pixels


def test_a_machine_without_room_for_the_workers_says_so(pipeline, tmp_path):
    with pytest.raises(UserError, match="--workers 64: Ray has"):
        train(str(pipeline.data), str(tmp_path / "run"), pipeline.recipe, workers=64, device="cpu")


@pytest.mark.promise("README: all paths share preprocessing and predictor")
def test_all_paths_see_the_same_pixels(pipeline, test_rows):
    spec = load_bundle(str(pipeline.run)).spec.preprocess
    uris = test_rows["uri"].to_pylist()
    expected = {uri: decode(Path(uri).read_bytes(), spec).pixels.tobytes() for uri in uris}
    columns = test_rows.select(["uri", "member", "label"])
    for_training = make_dataset(columns).map_batches(LoadForTraining(spec)).take_batch(len(uris))
    for_grading = make_dataset(columns).map_batches(LoadImages(spec)).take_batch(len(uris))
    assert [image.tobytes() for image in for_training["image"]] == [expected[uri] for uri in uris]
    found = dict(zip(for_grading["uri"], for_grading["image"], strict=True))
    assert {uri: image.tobytes() for uri, image in found.items()} == expected
    measured = dict(zip(for_grading["uri"], for_grading["statistics"], strict=True))
    for uri in uris:
        online = decode_image(Path(uri).read_bytes(), spec)
        assert online.decoded.pixels.tobytes() == expected[uri]
        assert online.statistics.tobytes() == measured[uri].tobytes()


def test_scaled_decoding_moves_neither_pixels_nor_grades(pipeline):
    bundle = load_bundle(str(pipeline.run))
    spec = bundle.spec.preprocess
    files = [Path(uri).read_bytes() for uri in manifest.read_manifest(str(pipeline.data))["uri"].to_pylist()]
    scaled = np.stack([decode(data, spec).pixels for data in files])
    full = np.stack([at_full_size(data, spec) for data in files])
    assert np.abs(scaled.astype(int) - full).mean() < 1.5
    predictor = Predictor(bundle, "cpu")
    before, after = (np.sort(softmax(predictor.logits(pixels), axis=1), axis=1) for pixels in (scaled, full))
    same = predictor.logits(scaled).argmax(axis=1) == predictor.logits(full).argmax(axis=1)
    assert same.mean() >= 0.98
    # Another grade only where two grades were about equally probable: the model was trained for some steps.
    leads = [probs[~same, -1] - probs[~same, -2] for probs in (before, after)]
    assert np.all(np.maximum(*leads) < 0.1)


class Answers(NamedTuple):
    """Result rows and online answers of the same images, by sha256, and the comparison with the shadow."""

    precision: str
    bulk: dict[str, dict[str, Any]]
    online: dict[str, dict[str, Any]]
    black: str
    compared: dict[str, Any]


@pytest.fixture(scope="module", params=["auto", pytest.param("fp32", marks=pytest.mark.slow)])
def answers(request, pipeline, bundle, test_rows, tmp_path_factory) -> Answers:
    """Grade the test split, a black image and noise of any kind in bulk and online, with a shadow."""
    root, precision = tmp_path_factory.mktemp("answers"), request.param
    folder = root / "photographs"
    folder.mkdir()
    for index, uri in enumerate(test_rows["uri"].to_pylist()):
        shutil.copy(uri, folder / f"{index}.jpg")
    (folder / "black.png").write_bytes(encoded(Image.new("RGB", (640, 480)), "PNG"))
    noise = Image.effect_noise((300, 200), 60).convert("RGB")
    for kind in KINDS:
        (folder / f"noise.{kind.lower()}").write_bytes(encoded(noise, kind))
    options = GradeOptions(ModelOptions("cpu", precision), heatmaps=0)
    grade(str(pipeline.run), str(folder), str(root / "graded"), options)
    bulk = {row["sha256"]: row for row in read_results(str(root / "graded" / RESULTS_FOLDER)).to_pylist()}
    port, audit = free_port(), str(root / "audit")
    settings = Settings(
        device="cpu",
        precision=precision,
        candidate=CandidateSettings(mode="shadow", share=SHARE),
        audit=AuditSettings(folder=audit),
    )
    app.start(str(pipeline.run), "127.0.0.1", port, settings, str(bundle))
    online = {}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for path in folder.iterdir():
                answer = client.post("/v1/grade", files={"file": ("a.jpg", path.read_bytes())}).json()
                online[answer["sha256"]] = answer
        copies = sum(is_chosen(sha256, SHARE) for sha256 in online)
        deadline = time.monotonic() + 60
        while True:  # copies are graded after the answers
            compared = compare(audit)
            done = compared["pairs"] and compared["pairs"][0]["photographs"] == copies
            if done or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        app.stop()
    black = hashlib.sha256((folder / "black.png").read_bytes()).hexdigest()
    return Answers(precision, bulk, online, black, compared)


def test_evaluation_bulk_and_online_give_equal_answers(pipeline, test_rows, answers):
    assert answers.online.keys() == answers.bulk.keys()
    assert len(answers.online) == test_rows.num_rows + 1 + len(KINDS)
    assert {row["error"] for row in answers.bulk.values()} == {None}
    if answers.precision == "auto":  # as the evaluation of the fixture ran
        evaluated = pq.read_table(pipeline.evaluation / "predictions.parquet").to_pylist()
        assert len(evaluated) == test_rows.num_rows
        for row in evaluated:
            other = answers.bulk[row["sha256"]]
            assert row["grade"] == other["grade"]
            assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    for sha256, answer in answers.online.items():
        row = answers.bulk[sha256]
        assert set(row) == set(answer)
        for name in ("grade", "grade_name", "grade_set", "unlikeness", "refer", "refer_reasons",
                     "model_version"):  # fmt: skip
            assert answer[name] == row[name]
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    black = answers.online[answers.black]
    assert black["refer"] and black["unlikeness"] > 1
    assert {"too_dark", "unlike_training"} <= set(black["refer_reasons"])


def test_a_shadow_answers_nobody_and_is_compared(answers, pipeline, bundle):
    first, second = (load_bundle(str(each)).spec.model_version for each in (pipeline.run, bundle))
    assert {answer["model_version"] for answer in answers.online.values()} == {first}
    copies = sum(is_chosen(sha256, SHARE) for sha256 in answers.online)
    assert 0 < copies < len(answers.online)
    counts = {row["model_version"]: row["photographs"] for row in answers.compared["models"]}
    assert (counts, answers.compared["failed"]) == ({first: len(answers.online)}, 0)
    (pair,) = answers.compared["pairs"]
    assert (pair["first"], pair["candidate"], pair["photographs"]) == (first, second, copies)
    assert pair["kappa"] < 1  # they are not the same model
