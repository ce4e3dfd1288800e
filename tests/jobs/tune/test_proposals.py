"""Proposals of trials: the seed decides, no two train alike, and TPE finds better settings than chance."""

import math

import numpy as np
import pytest

from jobs.train.driver import RECIPES
from jobs.tune.driver import SPACES
from jobs.tune.proposals import plan_trials, propose
from jobs.tune.trials import Trial
from scalp_core.errors import UserError
from scalp_core.models.recipe import CONDITIONS, load_recipe
from scalp_core.models.search_space import load_space, parse_space, with_settings

BASE = load_recipe("smoke", RECIPES, [])


def plan(space, base, trials, seed=0, workers=1):
    return [trial.settings for trial in plan_trials(space, base, trials, workers, seed)]


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_draws_recipes(path):
    space = load_space(path.stem, SPACES, BASE)
    drawn = plan(space, BASE, 50, seed=1)
    for settings in drawn:
        recipe = with_settings(BASE, settings, "a trial")
        assert {key: getattr(recipe, key) for key in settings} == settings
        for condition in CONDITIONS:
            if condition.setting in settings:
                assert condition.is_met(recipe.model_dump())
    for key in space:  # of each, some draws differ
        assert len({settings[key] for settings in drawn if key in settings}) > 1


@pytest.mark.medium
def test_draws_are_settled_by_the_seed_and_stay_inside():
    values = {
        "learning_rate": {"low": "1e-4", "high": "1e-2", "scale": "log"},
        "batch_size": {"low": 4, "high": 8},
        "loss": ["corn", "cross_entropy"],
    }
    space = parse_space(values, "mine", BASE)
    drawn = plan(space, BASE, 200, seed=5)
    assert drawn[:50] == plan(space, BASE, 50, seed=5) != plan(space, BASE, 50, seed=6)
    assert drawn[0] == {key: getattr(BASE, key) for key in space}  # what the search is compared with
    assert plan(space, BASE, 1, seed=5) == drawn[:1]
    drawn = drawn[1:]
    rates = [each["learning_rate"] for each in drawn]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-3 < max(rates) <= 1e-2
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.6  # half of them in each power of ten
    assert {each["batch_size"] for each in drawn} == {4, 5, 6, 7, 8}
    assert all(type(each["batch_size"]) is int for each in drawn)
    assert {each["loss"] for each in drawn} == {"corn", "cross_entropy"}


def test_trials_differ_and_a_small_space_reports_its_size():
    space = parse_space(
        {"loss": ["corn", "cross_entropy"], "accumulate": {"low": 1, "high": 3}}, "mine", BASE
    )
    drawn = plan(space, BASE, 6, seed=0)
    assert len({tuple(each.items()) for each in drawn}) == 6
    with pytest.raises(UserError, match="--trials 7: the space has only 6 combinations; use --trials 6"):
        plan(space, BASE, 7, seed=0)


def test_a_key_without_an_effect_is_not_drawn_and_makes_no_other_trial():
    values = {"loss": ["corn", "soft_ordinal", "cross_entropy"], "label_smoothing": [0.05, 0.1]}
    values["softness"] = [0.5, 1.0, 2.0]
    space = parse_space(values, "mine", BASE)
    drawn = plan(space, BASE, 7, seed=0)
    assert drawn[0] == {"loss": "cross_entropy", "label_smoothing": 0.0}  # the recipe as it is
    assert sorted(tuple(settings.items()) for settings in drawn[1:]) == [
        (("loss", "corn"),),
        (("loss", "cross_entropy"), ("label_smoothing", 0.05)),
        (("loss", "cross_entropy"), ("label_smoothing", 0.1)),
        (("loss", "soft_ordinal"), ("softness", 0.5)),
        (("loss", "soft_ordinal"), ("softness", 1.0)),
        (("loss", "soft_ordinal"), ("softness", 2.0)),
    ]
    with pytest.raises(UserError, match="--trials 8: the space has only 7 combinations; use --trials 7"):
        plan(space, BASE, 8, seed=0)


def test_settings_that_resolve_to_the_same_training_are_one_trial():
    space = parse_space(
        {"augment": ["auto", "flips", "dihedral"], "batch_norm": ["auto", "worker", "sync"]}, "mine", BASE
    )
    with pytest.raises(UserError, match="the space has only 2 combinations"):  # of one worker alone
        plan(space, BASE, 9, seed=0)
    two_workers = plan(space, BASE, 4, seed=0, workers=2)
    assert len({(each["augment"] == "dihedral", each["batch_norm"] == "worker") for each in two_workers}) == 4


def test_fixed_settings_may_leave_keys_without_an_effect():
    base = load_recipe("default", RECIPES, ["loss=corn"])
    space = load_space("default", SPACES, base, fixed={"loss"})
    assert "learning_rate" in space and "label_smoothing" not in space
    other = with_settings(base, {"loss": "cross_entropy"}, "a trial")
    assert other.label_smoothing == 0.05  # the default with that loss, not what it is with corn
    base = load_recipe("default", RECIPES, ["label_smoothing=0.2"])
    space = load_space("default", SPACES, base, fixed={"label_smoothing"})
    recipes = [with_settings(base, settings, "a trial") for settings in plan(space, base, 30, seed=0)]
    assert {(recipe.loss, recipe.label_smoothing) for recipe in recipes} == {
        ("cross_entropy", 0.2), ("weighted_cross_entropy", 0.2), ("corn", 0.0), ("soft_ordinal", 0.0)
    }  # fmt: skip


def test_combinations_that_the_recipe_refuses_are_not_proposed():
    base = load_recipe("default", RECIPES, ["batch_norm=worker"])
    space = parse_space({"weights": ["imagenet", "none"], "batch_norm": ["worker", "frozen"]}, "mine", base)
    drawn = {(settings["weights"], settings["batch_norm"]) for settings in plan(space, base, 3)}
    assert drawn == {("imagenet", "worker"), ("imagenet", "frozen"), ("none", "worker")}
    with pytest.raises(UserError, match="the space has only 3 combinations"):
        plan(space, base, 4)


def kappa(settings):
    """An artificial validation kappa, highest at a learning rate of 0.002 with weight decay 0.02 and corn."""
    distance = (
        math.log10(settings["learning_rate"] / 2e-3) ** 2 + math.log10(settings["weight_decay"] / 0.02) ** 2
    )
    return 0.9 - 0.1 * distance - 0.1 * (settings["loss"] != "corn")


def search(trials, seed):
    """Search with `kappa`, one trial after another; return the trials."""
    tried = []
    for number in range(1, trials + 1):
        settings = propose(number, SPACE, BASE, tried, 1, seed)
        tried.append(Trial(number, settings, "finished", "", [{"epoch": 1, "val_qwk": kappa(settings)}]))
    return tried


SPACE = parse_space(
    {
        "learning_rate": {"low": 1e-5, "high": 1e-1, "scale": "log"},
        "weight_decay": {"low": 1e-4, "high": 1, "scale": "log"},
        "loss": ["cross_entropy", "weighted_cross_entropy", "corn"],
    },
    "mine",
    BASE,
)


@pytest.mark.medium
def test_search_is_better_than_random():
    seeds = range(10)
    best = [max(kappa(trial.settings) for trial in search(24, seed)) for seed in seeds]
    random = [max(kappa(settings) for settings in plan(SPACE, BASE, 24, seed)) for seed in seeds]
    assert 0.9 - np.mean(best) < (0.9 - np.mean(random)) * 0.7


def test_resumed_search_proposes_the_same_trials():
    tried = search(12, seed=3)
    assert tried == search(12, seed=3) != search(12, seed=4)
    assert propose(9, SPACE, BASE, tried[:8], 1, seed=3) == tried[8].settings
