"""What follows from a leaky split says so: summary, picture, model name, card, rows."""

import json

import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.driver import evaluate
from jobs.train.driver import RECIPES, train
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.models.recipe import load_recipe
from tests.support.sources import audited, write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("leaky")
    write_set(root / "set", every_symptom=False)
    return audited(root / "set", root / "data", method="random", folds=3).data


def test_an_evaluation_says_it(bundle, data, tmp_path, capsys):
    evaluate(str(bundle), data, str(tmp_path), executor=LocalExecutor())
    summary = json.loads((tmp_path / "summary.json").read_text())
    record = manifest.read_spec(data).split
    assert (summary["split_method"], summary["leaky"]) == ("random", True)
    assert summary["leaking_pairs"] == record.leaking_pairs
    assert record.leaking_pairs["device"] > 0
    said = capsys.readouterr().out
    assert "LEAKY SPLIT" in said
    assert f"{record.leaking_pairs['device']:,} of one device" in said


@pytest.mark.promise("README: what follows from a random split reports the leak")
def test_a_bundle_and_all_it_answers_say_it(bundle, data):
    spec = load_bundle(str(bundle)).spec
    metrics = {"val": {"n": 9, "qwk": 0.9, "top1": 0.9, "macro_f1": 0.9, "mae": 0.1}}
    for method, leaky in (("random", True), ("group", False)):
        split = manifest.read_spec(data).split.model_copy(update={"method": method})
        training = spec.training.model_copy(update={"split": split})
        trained = spec.model_copy(update={"training": training, "metrics": metrics})
        assert trained.version_in("bf16").endswith("-leaky") == leaky
        assert "-leaky" in trained.version_in("int8") or not leaky
        card = render_model_card(trained)
        assert ("LEAKY SPLIT" in card) == leaky
        assert ("devices that training did not see" in card) != leaky


def test_a_fold_that_is_not_there_is_refused_before_anything_starts(data, tmp_path):
    with pytest.raises(UserError, match="--fold 7: the manifest does not have this fold; it has 0 to 2"):
        train(data, str(tmp_path / "run"), load_recipe("smoke", RECIPES, []), fold=7)
    assert not (tmp_path / "run").exists()
