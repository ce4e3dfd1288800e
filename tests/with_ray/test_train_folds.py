"""`scalp train --folds`: each image is answered by a bundle that was not trained on it; the label audit."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.evaluate.audit_labels import audit_labels
from jobs.train.driver import RECIPES
from jobs.train.folds import train_folds
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.models.recipe import load_recipe
from scalp_core.storage import read
from tests.support.sources import audited_jpegs

FOLDS = 2


def test_each_image_is_answered_out_of_fold_and_its_label_audited(cluster, tmp_path):
    prepared = audited_jpegs(tmp_path, folds=FOLDS)
    recipe = load_recipe(
        "smoke", RECIPES, ["size=32", "epochs=1", "architecture=test_resnet", "batch_size=8"]
    )
    run = tmp_path / "run"
    with pytest.raises(UserError, match="--folds 5: .* was prepared with 2 folds"):
        train_folds(prepared.data, str(run), recipe, 5, 1, "cpu")
    summary = train_folds(prepared.data, str(run), recipe, FOLDS, 1, "cpu")

    rows = pq.read_table(run / "out_of_fold.parquet").to_pylist()
    expected = {row["image_id"]: row for row in prepared.table.to_pylist() if row["fold"] is not None}
    assert sorted(row["image_id"] for row in rows) == sorted(expected)
    assert all(row["fold"] == expected[row["image_id"]]["fold"] for row in rows)
    for fold in range(FOLDS):
        bundle = load_bundle(str(run / f"fold-{fold}"))
        assert bundle.spec.training.fold == fold
        row = next(row for row in rows if row["fold"] == fold)
        pixels = decode(read(row["uri"]), bundle.spec.preprocess).pixels
        (answer,) = Predictor(bundle, "cpu").grade(pixels[None])
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)
    assert summary["metrics"]["n"] == len(rows)
    grades = np.array([row["probabilities"] for row in rows]).argmax(axis=1)
    assert summary["metrics"]["top1"] == pytest.approx(np.mean(grades == [row["label"] for row in rows]))

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
