"""Trials of a search: scheduling, records and failures, without training."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from jobs.common.console import write_json
from jobs.train.driver import IDENTITY_FILE, check_identity
from jobs.tune.trials import Trial, _reason, load_trials, make_asha
from scalp_core.errors import UserError
from scalp_core.models.recipe import Recipe


def entry(epoch, qwk, seconds=1.0):
    figures = dict.fromkeys(("train_loss", "train_top1", "val_loss", "val_top1", "learning_rate"), 0.5)
    return figures | {"epoch": epoch, "val_qwk": qwk, "seconds": seconds}


def decision(scheduler, epoch, qwk):
    trial = SimpleNamespace(trial_id=f"{epoch} {qwk}")
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, entry(epoch, qwk))


def test_finished_trials_count_for_new_ones():
    over = [Trial(number, {}, "finished", "", [entry(2, 0.2 * number)]) for number in (1, 2, 3)]
    assert decision(make_asha(6, 2, []), 2, 0.1) == TrialScheduler.CONTINUE
    assert decision(make_asha(6, 2, over), 2, 0.1) == TrialScheduler.STOP
    # Each trial gets the first epochs.
    assert decision(make_asha(6, 2, over), 1, 0.1) == TrialScheduler.CONTINUE
    assert decision(make_asha(6, 2, over), 2, 0.7) == TrialScheduler.CONTINUE
    assert decision(make_asha(6, 2, over), 6, 0.7) == TrialScheduler.STOP  # it is through


def test_records_of_an_older_search_with_old_spellings_are_resumed(tmp_path):
    recipe = Recipe(optimizer="adam", color_jitter=0.1)
    old = {**recipe.model_dump(), "optimiser": "adam", "colour_jitter": 0.1}
    del old["optimizer"], old["color_jitter"]
    space = {"color_jitter": [0.0, 0.1]}
    write_json(f"{tmp_path}/{IDENTITY_FILE}", {"recipe": old, "space": {"colour_jitter": [0.0, 0.1]}})
    check_identity(str(tmp_path), {"recipe": recipe.model_dump(), "space": space})
    with pytest.raises(UserError, match="holds a run with another optimizer; choose another RUN"):
        check_identity(str(tmp_path), {"recipe": Recipe(color_jitter=0.1).model_dump(), "space": space})
    record = asdict(Trial(1, {"colour_jitter": 0.1}, "finished", "", [entry(1, 0.5)]))
    write_json(f"{tmp_path}/trials/001.json", record)
    (trial,) = load_trials(str(tmp_path), [{"color_jitter": 0.1}])
    assert (trial.settings, trial.status) == ({"color_jitter": 0.1}, "finished")


def test_repeated_epoch_counts_once_and_earliest_best_epoch_wins():
    trial = Trial(1, {})
    for epoch, qwk, seconds in ((1, 0.3, 1.0), (2, 0.5, 1.0), (3, 0.5, 1.0), (2, 0.5, 9.0)):
        trial.add(entry(epoch, qwk, seconds) | {"more": "of Tune's"})
    assert [(each["epoch"], each["seconds"]) for each in trial.history] == [(1, 1.0), (2, 9.0), (3, 1.0)]
    assert trial.best["epoch"] == 2
    assert "more" not in trial.best


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ray::run() (pid=1)\n  File x\nRuntimeError: out of memory\n\n", "out of memory"),
        ("The actor died unexpectedly.\n\tclass_name: x\n", "The actor died unexpectedly."),
        ("ray.exceptions.RayTaskError(ValueError): a\n  raise\nValueError: bad", "ValueError: bad"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(text, reason):
    assert _reason(f"Failure # 1 (occurred at x)\n{text}") == reason
