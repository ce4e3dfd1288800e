"""A training with a fold validates on it, trains on the others, and leaves the test split alone."""

from __future__ import annotations

import pytest

from jobs.train.driver import RECIPES, train
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.models.recipe import load_recipe
from tests.support.sources import audited_jpegs

FOLD = 1


def test_a_fold_is_the_validation_split(cluster, tmp_path):
    prepared = audited_jpegs(tmp_path, folds=3)
    recipe = load_recipe(
        "smoke", RECIPES, ["size=32", "epochs=1", "architecture=test_resnet", "batch_size=8"]
    )
    run = str(tmp_path / "run")
    summary = train(prepared.data, run, recipe, 1, "cpu", fold=FOLD)

    rows = prepared.table.select(["label", "fold", "split"]).to_pylist()
    trained = [row["label"] for row in rows if row["fold"] not in (None, FOLD)]
    validated = [row for row in rows if row["fold"] == FOLD]
    assert len(validated) != sum(row["split"] == "val" for row in rows)  # so that the fold decides
    (entry,) = summary["history"]
    assert (entry["val_n"], summary["validation"]["n"]) == (len(validated), len(validated))
    assert entry["steps"] == len(trained) // 8
    spec = load_bundle(run).spec
    assert spec.training.fold == FOLD
    assert spec.training.grade_counts == [trained.count(grade) for grade in range(NUM_GRADES)]
    assert f"fold {FOLD} of 3 for validation" in render_model_card(spec)

    with pytest.raises(UserError, match="holds a run with another fold; choose another RUN"):
        train(prepared.data, run, recipe, 1, "cpu", fold=0)
