"""`--local` runs a command in this process, without Ray, with the same answers."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from jobs.cli import executors
from jobs.cli.main import app
from jobs.common.ray_executor import RayExecutor
from jobs.data import prepare
from jobs.data.prepare import is_small
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets.manifest import read_manifest, select_split
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.labels.log import open_log
from scalp_core.synthetic.plan import SynthOptions
from tests.support.plots import leave_undrawn
from tests.support.sources import write_small_set


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "set"
    write_small_set(folder, SynthOptions(images=40, seed=3))
    return folder


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    def refuse(_: RayExecutor) -> None:
        raise AssertionError("the command starts Ray")

    monkeypatch.setattr(RayExecutor, "cluster", refuse)


@pytest.fixture(autouse=True)
def _undrawn_plots(monkeypatch):
    leave_undrawn(monkeypatch)


def scalp(*arguments: object) -> None:
    app(list(map(str, arguments)), standalone_mode=False)


@pytest.mark.medium
def test_local_grade_answers_as_the_predictor(bundle, images, tmp_path, capsys):
    out = tmp_path / "graded"
    scalp("grade", bundle, images, out, "--local", "--device", "cpu", "--heatmaps", 0, "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((out / "summary.json").read_text())
    rows = pq.read_table(tmp_path / "graded/results").to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows}) == 40
    predictor = Predictor(load_bundle(str(bundle)), "cpu")
    preprocess = predictor.spec.preprocess
    for row in rows[:5]:
        pixels = decode(Path(row["uri"]).read_bytes(), preprocess).pixels
        (answer,) = predictor.grade(pixels[None])
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-6)


@pytest.mark.medium
def test_local_prepare_and_evaluate_account_for_each_image(bundle, images, tmp_path, capsys):
    scalp("prepare", images, tmp_path / "data", "--local")
    capsys.readouterr()
    scalp("evaluate", bundle, tmp_path / "data", tmp_path / "test", "--local", "--device", "cpu", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "test/summary.json").read_text())
    test = select_split(read_manifest(str(tmp_path / "data")), "test")
    predictions = pq.read_table(tmp_path / "test/predictions.parquet")
    assert sorted(predictions["image_id"].to_pylist()) == sorted(test["image_id"].to_pylist()) != []
    assert np.isfinite(np.array(predictions["probabilities"].to_pylist())).all()


def test_several_models_need_ray(bundle, images, tmp_path):
    with pytest.raises(AssertionError, match="the command starts Ray"):
        scalp("grade", bundle, images, tmp_path / "graded", "--replicas", 2, "--device", "cpu")


def test_grade_on_one_machine_starts_no_ray(bundle, images, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test file may have started one
    scalp("grade", bundle, images, tmp_path / "graded", "--device", "cpu", "--heatmaps", 0)
    assert pq.read_table(tmp_path / "graded/results").num_rows == 40


def test_prepare_chooses_ray_by_the_source(images, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(executors, "make_executor", lambda local, _: chosen.append(local))
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: None)
    scalp("prepare", images, tmp_path / "out")
    scalp("prepare", images, tmp_path / "out", "--cluster")
    scalp("prepare", "s3://clinic/2024", tmp_path / "out")
    scalp("prepare", "s3://clinic/2024", tmp_path / "out", "--local")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    scalp("prepare", images, tmp_path / "out")
    assert chosen == [True, False, False, True, False]


def test_only_small_local_sources_are_prepared_here(images, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dangling.jpg").symlink_to("nowhere")
    (tmp_path / "table.csv").write_text("uri,label\n")
    (tmp_path / "set.zip").write_bytes(b"")
    assert is_small(str(images)) and is_small(f"{tmp_path}/set") and is_small(f"{tmp_path}/set.zip")
    elsewhere = (
        "s3://clinic/2024",
        f"{tmp_path}/table.csv",
        f"{tmp_path}/missing",
        f"{tmp_path}/missing.zip",
    )
    assert not any(map(is_small, elsewhere))
    open_log(f"{tmp_path}/labels")
    assert not is_small(f"{tmp_path}/labels")
    total = sum(file.stat().st_size for file in images.rglob("*") if file.is_file())
    monkeypatch.setattr(prepare, "_SMALL_BYTES", total)
    assert not is_small(str(images))
    monkeypatch.setattr(prepare, "_SMALL_BYTES", total + 1)
    assert is_small(str(images))


def test_grade_joins_a_named_cluster(bundle, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(AssertionError, match="the command starts Ray"):
        scalp("grade", bundle, images, tmp_path / "graded", "--device", "cpu")
