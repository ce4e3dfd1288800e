"""`scalp train --folds` with stand-ins of its trainings: what trains again, failures, and the bundle."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.common.console import write_json
from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.ensemble import ENSEMBLE, MEAN
from jobs.train import folds as module
from jobs.train import student
from jobs.train.driver import RECIPES, Shared, SoftLabels
from jobs.train.folds import check_outcomes, run_in_threads, train_folds
from scalp_core.bundles.bundle import INITIAL_FILE, save_bundle
from scalp_core.bundles.contract import Teachers
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.errors import UserError
from scalp_core.inference.out_of_fold import TEACHERS_SHARE
from scalp_core.models.recipe import load_recipe
from tests.support.bundles import make_bundle
from tests.support.sources import audited_jpegs

FOLDS = 2
RECIPE = load_recipe("smoke", RECIPES, ["size=32", "epochs=1", "architecture=test_resnet"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return audited_jpegs(tmp_path_factory.mktemp("folds"), 64, folds=FOLDS)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("untrained") / "bundle")


class Trainings:
    """Trainings that copy an untrained bundle; those in `failing` fail."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.trained, self.failing, self.lessons = bundle, [], set(), {}

    def __call__(self, _data, run, *_, soft_labels=None, **__):
        folder = Path(run)
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        if folder.name in self.failing:
            raise UserError(f"training in {run} failed 4 times, the last time with: node lost; look at it")
        self.trained.append(folder.name)
        shutil.copytree(self.bundle, folder / "bundle", dirs_exist_ok=True)
        loaded = load_bundle(run)
        teachers = soft_labels and soft_labels.teachers
        training = loaded.spec.training.model_copy(update={"teachers": teachers})
        spec = loaded.spec.model_copy(update={"name": folder.name, "training": training})
        save_bundle(str(folder / "bundle"), spec, {})
        for name in (INITIAL_FILE, "curves.png"):
            (folder / name).write_bytes(b"file of a training")
        self.lessons[folder.name] = soft_labels
        summary = {"validation": {"qwk": 0.5}, "best_epoch": 1}
        write_json(str(folder / "summary.json"), summary)
        return summary


@pytest.fixture
def trainings(monkeypatch, untrained):
    stand_in = Trainings(untrained)
    monkeypatch.setattr(module, "train", stand_in)
    monkeypatch.setattr(student, "train", stand_in)
    monkeypatch.setattr(module, "_plan", lambda *_: Shared())
    return stand_in


def run_folds(prepared, run):
    return train_folds(prepared.data, str(run), RECIPE, FOLDS, 1, "cpu", "none", LocalExecutor())


@pytest.mark.medium
def test_a_failed_fold_is_named_and_the_same_command_trains_only_what_is_missing(
    prepared, trainings, tmp_path
):
    trainings.failing = {"fold-0"}
    with pytest.raises(UserError, match="fold 0 of 2 failed, and the others are kept: .*node lost") as failed:
        run_folds(prepared, tmp_path / "run")
    assert str(failed.value).endswith("the same command trains only what is missing")
    assert trainings.trained == ["fold-1"]
    trainings.failing = set()
    summary = run_folds(prepared, tmp_path / "run")
    assert trainings.trained == ["fold-1", "fold-0", "student"]
    assert run_folds(prepared, tmp_path / "run") == json.loads(json.dumps(summary))
    assert len(trainings.trained) == 3


@pytest.mark.medium
def test_the_bundle_is_the_student_with_the_decision_of_all_images(
    prepared, trainings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(student, "list_worse", lambda *_: [])
    run = tmp_path / "run"
    summary = run_folds(prepared, run)
    rows = pq.read_table(run / "out_of_fold.parquet").to_pylist()
    images = [row for row in prepared.table.to_pylist() if row["fold"] is not None]
    assert sorted(row["image_id"] for row in rows) == sorted(row["image_id"] for row in images)

    spec, own = load_bundle(str(run)).spec, load_bundle(str(run / "student")).spec
    assert spec.model_version == summary["student"]["model_version"] == f"run-{spec.weights_sha256[:12]}"
    assert (spec.temperature, spec.bias) == (own.temperature, own.bias)
    teachers = spec.training.teachers
    assert teachers.models == tuple(
        load_bundle(str(run / f"fold-{fold}")).spec.model_version for fold in range(FOLDS)
    )
    assert (teachers.images, teachers.decide, own.training.teachers.decide) == (len(rows), True, False)
    assert spec.conformal.model_dump(mode="json") == summary["decision"]["conformal"]
    assert spec.conformal.groups == teachers.groups == len({row["group"] for row in rows})
    assert f"{len(rows)} images in {teachers.groups} groups" in render_model_card(spec)

    lessons = trainings.lessons["student"]
    row = rows[0]
    expected = (1 - TEACHERS_SHARE) * np.eye(4)[row["label"]]
    expected += TEACHERS_SHARE * np.array(row["probabilities"])
    assert lessons.by_image[row["image_id"]] == pytest.approx(expected, abs=1e-6)

    # Student and folds are the same model here, so each row of the comparison is the same.
    test = summary["test"]
    assert test["images"] == sum(row["split"] == "test" for row in prepared.table.to_pylist())
    assert test["differences"][MEAN]["top1"]["difference"] == 0
    assert test["differences"][ENSEMBLE]["top1"]["difference"] == 0
    printed = capsys.readouterr().out
    assert "QWK per fold" in printed
    assert f"A {ENSEMBLE}\nB student" in printed and f"A {MEAN}\nB student" in printed


@pytest.mark.medium
def test_a_student_that_answers_worse_than_the_folds_keeps_the_decision_of_its_validation(
    prepared, trainings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(student, "list_worse", lambda *_: ["coverage"])
    summary = run_folds(prepared, tmp_path / "run")
    spec = load_bundle(str(tmp_path / "run")).spec
    own = load_bundle(str(tmp_path / "run/student")).spec
    assert (spec.conformal, spec.referral, spec.training) == (own.conformal, own.referral, own.training)
    assert summary["student"]["worse_than_folds"] == ["coverage"]
    assert "worse than the folds in grade sets with the label" in " ".join(capsys.readouterr().out.split())


def test_an_image_with_a_soft_label_of_readers_keeps_it():
    teachers = Teachers(models=("m",), share=0.5, images=1, groups=1)
    softs = pa.array([None, [0, 0.5, 0.5, 0]], pa.list_(pa.float32()))
    learned = SoftLabels(teachers, {"a": np.array([0.75, 0.25, 0, 0], np.float32)})
    rows = pa.table({"image_id": ["a", "b"], "soft_label": softs})
    assert learned.of(rows).tolist() == [[0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0]]


def test_an_error_of_all_folds_is_that_of_one():
    with pytest.raises(UserError, match="^too few images$"):
        check_outcomes([UserError("too few images")] * 3)
    with pytest.raises(UserError, match="fold 0 and 2 of 3 failed"):
        check_outcomes([UserError("a"), 0.5, UserError("b")])


def test_folds_run_at_the_same_time_in_threads():
    """Each waits for the other, so one after another would never end."""
    both = threading.Barrier(2, timeout=30)
    assert sorted(run_in_threads(lambda number: both.wait() * 0 + number, 2, 2)) == [0, 1]
