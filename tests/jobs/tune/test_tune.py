"""Trials of a search: early stopping, records and failures, without training."""

from dataclasses import asdict

import pytest

from jobs.common.console import read_json, write_json
from jobs.train.driver import IDENTITY_FILE, check_identity
from jobs.tune.search import Search
from jobs.tune.trials import Trial, is_stopped, load_trials
from scalp_core.errors import UserError
from scalp_core.models.recipe import Recipe

RECIPE = Recipe(epochs=6)
SPACE = {"learning_rate": (0.001, 0.002, 0.003, 0.004)}


def entry(epoch, qwk, seconds=1.0):
    figures = dict.fromkeys(("train_loss", "train_top1", "val_loss", "val_top1", "learning_rate"), 0.5)
    return figures | {"epoch": epoch, "val_qwk": qwk, "seconds": seconds}


def start(out, count=4):
    return Search(str(out), SPACE, RECIPE, count, workers=1, seed=0)


def test_finished_trials_count_for_new_ones():
    over = [Trial(number, {}, "finished", "", [entry(2, 0.2 * number)]) for number in (1, 2, 3)]

    def stopped(epoch, kappa, others):
        return is_stopped(Trial(4, {}, "running", "", [entry(epoch, kappa)]), others, epochs=6)

    assert not stopped(2, 0.1, [])
    assert stopped(2, 0.1, over)
    assert not stopped(1, 0.1, over)  # each trial gets the first epochs
    assert not stopped(3, 0.1, over)  # between the rungs
    assert not stopped(2, 0.7, over)


def test_search_starts_each_trial_once_and_stops_the_worst(tmp_path):
    search = start(tmp_path)
    trials = [search.start_next() for _ in range(4)]
    assert search.start_next() is None
    assert [trial.number for trial in trials] == [1, 2, 3, 4]
    assert {trial.settings["learning_rate"] for trial in trials} == set(SPACE["learning_rate"])
    assert not search.add_epoch(1, entry(1, 0.5))
    assert not search.add_epoch(1, entry(2, 0.5))
    assert search.add_epoch(2, entry(2, 0.4))
    assert search.add_epoch(1, entry(6, 0.6))
    assert search.end(3, "out of memory").reason == "out of memory"
    assert search.end(1, None).status == "finished"
    statuses = {trial.number: trial.status for trial in load_trials(str(tmp_path), 4)}
    assert statuses == {1: "finished", 2: "stopped", 3: "waiting", 4: "waiting"}


@pytest.mark.promise("README: a stopped run resumes")
def test_resumed_search_starts_unfinished_trials_with_their_settings(tmp_path):
    search = start(tmp_path)
    settings = [search.start_next().settings for _ in range(3)]
    search.add_epoch(1, entry(6, 0.5))
    search.add_epoch(3, entry(1, 0.5))
    resumed = start(tmp_path)
    started = [resumed.start_next() for _ in range(3)]
    assert [trial.number for trial in started] == [3, 2, 4]  # those with checkpoints first
    assert [trial.settings for trial in started[:2]] == [settings[2], settings[1]]
    assert started[0].history == [entry(1, 0.5)]
    assert resumed.start_next() is None
    assert read_json(f"{tmp_path}/trials/001.json")["status"] == "finished"


def test_records_of_an_older_search_with_old_spellings_are_resumed(tmp_path):
    recipe = Recipe(optimizer="adam", color_jitter=0.1)
    old = {**recipe.model_dump(), "optimiser": "adam", "colour_jitter": 0.1}
    del old["optimizer"], old["color_jitter"]
    space = {"color_jitter": [0.0, 0.1]}
    write_json(f"{tmp_path}/{IDENTITY_FILE}", {"recipe": old, "space": {"colour_jitter": [0.0, 0.1]}})
    check_identity(str(tmp_path), {"recipe": recipe.model_dump(), "space": space})
    with pytest.raises(UserError, match=r"holds a run with optimizer adam \(now adamw\); choose another RUN"):
        check_identity(str(tmp_path), {"recipe": Recipe(color_jitter=0.1).model_dump(), "space": space})
    record = asdict(Trial(1, {"colour_jitter": 0.1}, "finished", "", [entry(1, 0.5)]))
    write_json(f"{tmp_path}/trials/001.json", record)
    (trial,) = load_trials(str(tmp_path), 1)
    assert (trial.settings, trial.status) == ({"color_jitter": 0.1}, "finished")


def test_repeated_epoch_counts_once_and_earliest_best_epoch_wins():
    trial = Trial(1, {})
    for epoch, qwk, seconds in ((1, 0.3, 1.0), (2, 0.5, 1.0), (3, 0.5, 1.0), (2, 0.5, 9.0)):
        trial.add(entry(epoch, qwk, seconds) | {"more": "of Tune's"})
    assert [(each["epoch"], each["seconds"]) for each in trial.history] == [(1, 1.0), (2, 9.0), (3, 1.0)]
    assert trial.best["epoch"] == 2
    assert "more" not in trial.best
