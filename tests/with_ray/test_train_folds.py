"""`scalp train --folds`: out-of-fold answers, the student that learns from them, and the label audit."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.audit_labels import audit_labels
from jobs.train import driver, folds
from jobs.train.driver import RECIPES
from jobs.train.folds import train_folds
from jobs.train.scaling import plan_scaling
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.models.recipe import load_recipe
from scalp_core.storage import read
from tests.support.sources import audited_jpegs

FOLDS = 2


def test_each_image_is_answered_out_of_fold_and_its_label_audited(cluster, tmp_path, monkeypatch, capsys):
    prepared = audited_jpegs(tmp_path, folds=FOLDS)
    recipe = load_recipe(
        "smoke", RECIPES, ["size=32", "epochs=1", "architecture=test_resnet", "batch_size=8"]
    )
    run = tmp_path / "run"
    with pytest.raises(UserError, match="--folds 5: .* was prepared with 2 folds"):
        train_folds(prepared.data, str(run), recipe, 5, 1, "cpu")
    # As on a cluster of two nodes: both folds at a time.
    monkeypatch.setattr(folds, "plan_side_by_side", lambda *plan: (plan_scaling(*plan[:3]), FOLDS))
    summary = train_folds(prepared.data, str(run), recipe, FOLDS, 1, "cpu", "none")
    printed = capsys.readouterr().out
    assert all(f"fold-{fold}: epoch 1/1" in printed for fold in range(FOLDS))
    assert train_folds(prepared.data, str(run), recipe, FOLDS, 1, "cpu", "none") == json.loads(
        json.dumps(summary)
    )

    rows = pq.read_table(run / "out_of_fold.parquet").to_pylist()
    expected = {row["image_id"]: row for row in prepared.table.to_pylist() if row["fold"] is not None}
    assert sorted(row["image_id"] for row in rows) == sorted(expected)
    assert all(row["fold"] == expected[row["image_id"]]["fold"] for row in rows)
    for fold in range(FOLDS):
        bundle = load_bundle(str(run / f"fold-{fold}"))
        assert bundle.spec.training.fold == fold
        row = next(row for row in rows if row["fold"] == fold)
        pixels = decode(read(row["uri"]), bundle.spec.preprocess).pixels
        (logits,) = Predictor(bundle, "cpu").logits(pixels[None])
        assert row["logits"] == pytest.approx(logits.tolist(), abs=1e-4)
        # No fold trains on the val split, by which the student is calibrated.
        trained = [each for each in expected.values() if each["fold"] != fold and each["split"] == "train"]
        assert sum(bundle.spec.training.grade_counts) == len(trained)
    assert summary["metrics"]["n"] == len(rows)
    grades = np.array([row["probabilities"] for row in rows]).argmax(axis=1)
    assert summary["metrics"]["top1"] == pytest.approx(np.mean(grades == [row["label"] for row in rows]))

    student = load_bundle(str(run)).spec
    assert student.training.teachers.images == len(rows)
    assert sum(student.training.grade_counts) == sum(row["split"] == "train" for row in expected.values())
    history = json.loads((run / "student/summary.json").read_text())["history"]
    assert np.isfinite([entry["train_loss"] for entry in history]).all()
    test = [row for row in prepared.table.to_pylist() if row["split"] == "test"]
    pixels = np.stack([decode(read(row["uri"]), student.preprocess).pixels for row in test])
    grades = [answer.grade for answer in Predictor(load_bundle(str(run)), "cpu").grade(pixels)]
    top1 = np.mean(np.equal(grades, [row["label"] for row in test]))
    assert summary["test"]["models"]["student"]["top1"]["value"] == pytest.approx(top1)

    audited = audit_labels(str(run), str(tmp_path / "suspects"), pictures=4)
    suspects = pq.read_table(tmp_path / "suspects/suspects.parquet").to_pylist()
    assert len(suspects) == audited["suspects"] == np.sum(audited["by_label_and_suggestion"])
    page = (tmp_path / "suspects/report.html").read_text()
    assert len(re.findall("<figure>", page)) == min(4, len(suspects))
    assert json.loads((tmp_path / "suspects/summary.json").read_text())["images"] == len(rows)
    with pytest.raises(
        UserError, match="has no out_of_fold.parquet; make it with scalp train DATA RUN --folds"
    ):
        audit_labels(str(run / "fold-0"), str(tmp_path / "other"))


def test_folds_of_one_worker_train_one_after_another_in_this_process(tmp_path, monkeypatch, capsys):
    prepared = audited_jpegs(tmp_path, folds=FOLDS)
    recipe = load_recipe(
        "smoke", RECIPES, ["size=32", "epochs=1", "architecture=test_resnet", "batch_size=8"]
    )

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the command starts Ray")

    for module in (driver, folds):
        monkeypatch.setattr(module, "connect", refuse)
    run, steps = tmp_path / "run", []
    summary = train_folds(
        prepared.data,
        str(run),
        recipe,
        FOLDS,
        None,
        "cpu",
        "none",
        LocalExecutor(),
        local=True,
        progress=lambda: steps.append(1),
    )
    assert f"training {FOLDS} folds, one after another in this process" in capsys.readouterr().out
    assert len(steps) >= FOLDS + 1  # a crash after any model counts as progress
    models = [load_bundle(str(run / name)).spec.training for name in ("fold-0", "fold-1", ".")]
    assert [model.fold for model in models] == [0, 1, None]
    assert models[-1].teachers.images == summary["metrics"]["n"]
