"""A search over settings: every trial is accounted for, the best is the best, and it is found once."""

import csv
import json
import shutil
from collections import Counter

import pytest
import ray
import yaml
from PIL import Image

from jobs.train.driver import RECIPES
from jobs.tune.driver import tune
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.models.recipe import load_recipe
from scalp_core.models.search_space import parse_space
from scalp_core.storage import outputs

EPOCHS = 3
# A trial with the last of them fails in its first epoch: the loss is not finite.
SPACE = {"learning_rate": [0.003, 0.01, 1e30]}


@pytest.fixture(scope="module")
def base():
    return load_recipe("smoke", RECIPES, ["size=64", f"epochs={EPOCHS}", "architecture=test_resnet"])


@pytest.fixture(scope="module")
def searched(pipeline, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("tune")
    space = parse_space(SPACE, "mine", base)
    arguments = {"space": space, "trials": 3, "device": "cpu", "seed": 5}
    return out, arguments, tune(str(pipeline.data), str(out), base, **arguments)


def rows_of(out):
    with (out / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_trial_is_in_the_table_with_its_settings_and_its_end(searched):
    out, _, summary = searched
    rows = rows_of(out)
    assert [row["trial"] for row in rows] == ["1", "2", "3"]
    assert len({row["learning_rate"] for row in rows}) == 3
    assert Counter(row["status"] for row in rows) == summary["statuses"]
    for row in rows:
        failed = float(row["learning_rate"]) == 1e30
        assert (row["status"] == "failed") == failed
        assert (int(row["epochs"]) == EPOCHS) == (row["status"] == "finished")
        if failed:
            assert "not finite" in row["reason"] and not row["val_qwk"]
        else:
            assert 1 <= int(row["best_epoch"]) <= int(row["epochs"])
            assert 0 <= float(row["val_top1"]) <= 1 and float(row["seconds"]) > 0
    assert {"failed", "finished"} <= summary["statuses"].keys()


@pytest.mark.slow
def test_the_best_recipe_is_the_best_trial_s_and_can_be_trained(searched, base, s3):
    out, _, summary = searched
    best = max((row for row in rows_of(out) if row["val_qwk"]), key=lambda row: float(row["val_qwk"]))
    assert summary["best"]["trial"] == int(best["trial"])
    recipe = load_recipe(str(out / "best.yaml"), RECIPES, [])
    assert f"{recipe.learning_rate}" == best["learning_rate"]
    assert recipe == base.model_copy(update={"learning_rate": recipe.learning_rate})
    stored = f"s3://{s3.bucket}/tune/best.yaml"
    storage.write(stored, (out / "best.yaml").read_bytes())
    assert load_recipe(stored, RECIPES, []) == recipe
    assert yaml.safe_load((out / "best.yaml").read_text()) == recipe.model_dump()
    with Image.open(out / "tune.png") as picture:
        assert picture.size[0] > 800
    assert not (out / outputs.SCRATCH_FOLDER).exists()  # neither checkpoints nor pickles stay


@pytest.mark.slow
def test_a_finished_search_ends_at_once_and_another_one_is_refused(searched, pipeline, base):
    out, arguments, _ = searched
    before = (out / "trials.csv").stat().st_mtime_ns
    assert tune(str(pipeline.data), str(out), base, **arguments) == json.loads(
        (out / "summary.json").read_text()
    )
    assert (out / "trials.csv").stat().st_mtime_ns == before
    for changes, word in (({"seed": 7}, "draw_seed"), ({"trials": 5}, "trials"), ({"space": {}}, "space")):
        with pytest.raises(UserError, match=f"holds a run with (another )?{word}.*; choose another OUT"):
            tune(str(pipeline.data), str(out), base, **arguments | changes)
    other = base.model_copy(update={"batch_size": 8})
    with pytest.raises(UserError, match=r"holds a run with batch_size \d+ \(now 8\); choose another OUT"):
        tune(str(pipeline.data), str(out), other, **arguments)


@pytest.mark.promise("README: a stopped run resumes")
@pytest.mark.slow
def test_a_stopped_search_goes_on_without_the_trials_that_are_over(
    searched, pipeline, base, tmp_path, capsys
):
    out, arguments, _ = searched
    shutil.copytree(out / "trials", tmp_path / "trials")
    for name in ("run.json", outputs.MARKER_FILE):
        shutil.copy(out / name, tmp_path)
    records = [json.loads(path.read_text()) for path in sorted((out / "trials").glob("*.json"))]
    trained = [record for record in records if record["status"] != "failed"]
    done, missing = trained[0], trained[1]
    done["history"][-1]["val_qwk"] = 0.99  # told, not trained: whoever trained it again would not find it
    for record in records:
        history = record["history"] or done["history"][:1]
        record |= {"status": "stopped", "reason": "", "history": history}
        (tmp_path / "trials" / f"{record['number']:03d}.json").write_text(json.dumps(record))
    # As it is left when everything is killed before the first epoch is over.
    begun = missing | {"status": "running", "history": []}
    (tmp_path / "trials" / f"{missing['number']:03d}.json").write_text(json.dumps(begun))
    summary = tune(str(pipeline.data), str(tmp_path), base, **arguments)
    assert "resuming: 2 of 3 trials are finished" in capsys.readouterr().out
    assert (summary["best"]["trial"], summary["best"]["val_qwk"]) == (done["number"], 0.99)
    rows = {int(row["trial"]): row for row in rows_of(tmp_path)}
    assert rows[missing["number"]]["status"] in ("finished", "stopped")
    assert float(rows[missing["number"]]["val_qwk"]) < 0.99


def test_a_cluster_that_cannot_hold_a_trial_says_so_before_anything_is_written(pipeline, base, tmp_path):
    space = parse_space(SPACE, "mine", base)
    with pytest.raises(UserError, match="--workers 64: Ray has"):
        tune(str(pipeline.data), str(tmp_path / "out"), base, space, trials=2, workers=64, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_search_that_another_process_holds_is_refused(pipeline, base, tmp_path):
    out, space = str(tmp_path / "out"), parse_space({"learning_rate": [0.001, 0.002]}, "mine", base)
    with outputs.open_output(out, "tune"), pytest.raises(UserError, match="out is in use by scalp tune on"):
        tune(str(pipeline.data), out, base, space, trials=2, device="cpu")
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_work_that_needs_all_cpus_runs_after_a_search(searched, cluster):
    """What a search leaves reserved, the next command would wait for without end."""
    all_cpus = ray.remote(lambda: "ran").options(num_cpus=cluster.cpus)
    assert ray.get(all_cpus.remote(), timeout=120) == "ran"
