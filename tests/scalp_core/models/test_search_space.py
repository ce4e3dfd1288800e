"""The search space of `scalp tune`, and its trials."""

import pytest

from jobs.train.driver import RECIPES
from jobs.tune.driver import SPACES
from scalp_core.errors import UserError
from scalp_core.models.recipe import CONDITIONS, load_recipe
from scalp_core.models.search_space import load_space, parse_space, sample_trials, with_settings
from scalp_core.settings import parse_overrides

BASE = load_recipe("smoke", RECIPES, [])


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_draws_recipes(path):
    space = load_space(path.stem, SPACES, BASE)
    drawn = sample_trials(space, BASE, 50, seed=1)
    for settings in drawn:
        recipe = with_settings(BASE, settings, "a trial")
        assert {key: getattr(recipe, key) for key in settings} == settings
        for condition in CONDITIONS:
            if condition.setting in settings:
                assert condition.is_met(recipe.model_dump())
    for key in space:  # of each, some draws differ
        assert len({settings[key] for settings in drawn if key in settings}) > 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learnig_rate": [1]}, "mine: unknown key 'learnig_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": {"low": 1, "hihg": 2}}, "learning_rate: unknown key 'hihg'; did you mean 'high'"),
        ({"learning_rate": {"low": 1}}, "mine: learning_rate: high: Field required"),
        ({"learning_rate": {"low": 2, "high": 1}}, r"low \(2\) must be less than high \(1\)"),
        ({"learning_rate": {"low": 1, "high": float("inf")}}, "both finite"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "log"}}, r"low \(0\) must be more than 0"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "exp"}}, "weight_decay: scale: Input should be"),
        ({"label_smoothing": {"low": 0, "high": 2}}, "mine: label_smoothing: Input should be less than 1"),
        ({"loss": ["corn", "focal"]}, "mine: loss: Input should be 'cross_entropy'"),
        ({"loss": {"low": 0, "high": 1}}, "mine: loss is not a number"),
        ({"batch_norm": {"low": 0, "high": 1}}, "mine: batch_norm is not a number"),
        ({"batch_size": {"low": 8.5, "high": 16}}, "mine: batch_size: Input should be a valid integer"),
        ({"learning_rate": 0.1}, "mine: learning_rate: write a list such as"),
        ({"learning_rate": []}, "mine: learning_rate: write a list such as"),
        ({"ema_decay": [0, 0.0]}, "mine: ema_decay: a value occurs twice"),
        ({"epochs": [1, 2]}, "mine: epochs cannot vary"),
        ({"coverage": [0.8, 0.9]}, "mine: coverage cannot vary"),
        ({"softness": [1, 2]}, "mine: softness has no effect, because loss is never soft_ordinal; omit it"),
        (
            {"loss": ["corn", "soft_ordinal"], "label_smoothing": {"low": 0, "high": 0.1}},
            "label_smoothing has no effect, because loss is never cross_entropy or weighted_cross_entropy",
        ),
        ({"frozen_epochs": [0, 6]}, r"mine: frozen_epochs \(6\) must be fewer than epochs \(6\)"),
    ],
)  # fmt: skip
def test_invalid_space_is_refused_in_one_line_with_the_key(values, words):
    with pytest.raises(UserError, match=words) as refused:
        parse_space(values, "mine", BASE)
    assert "\n" not in str(refused.value)


def test_old_spellings_of_keys_are_accepted(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("colour_jitter: [0.0, 0.1]\noptimiser: [adam, adamw]\nweight_decay: [0.1]\n")
    assert list(load_space(str(path), SPACES, BASE)) == ["color_jitter", "optimizer", "weight_decay"]
    fixed = parse_overrides(["colour_jitter=0.1"])
    assert list(load_space(str(path), SPACES, BASE, fixed)) == ["optimizer", "weight_decay"]


def test_files_and_names_of_spaces(tmp_path):
    with pytest.raises(UserError, match="no space 'wide'; give one of default"):
        load_space("wide", SPACES, BASE)
    path = tmp_path / "mine.yaml"
    path.write_text("loss: [corn, cross_entropy]\nlearning_rate: {low: 1e-4, high: 3e-3, scale: log}\n")
    assert list(load_space(str(path), SPACES, BASE)) == ["loss", "learning_rate"]
    assert list(load_space(str(path), SPACES, BASE, fixed={"loss"})) == ["learning_rate"]
    with pytest.raises(UserError, match="no key is left to vary"):
        load_space(str(path), SPACES, BASE, fixed={"loss", "learning_rate"})
    path.write_text("- loss\n")
    with pytest.raises(UserError, match="must hold lines"):
        load_space(str(path), SPACES, BASE)


def test_draws_are_settled_by_the_seed_and_stay_inside():
    values = {
        "learning_rate": {"low": "1e-4", "high": "1e-2", "scale": "log"},
        "batch_size": {"low": 4, "high": 8},
        "loss": ["corn", "cross_entropy"],
    }
    space = parse_space(values, "mine", BASE)
    drawn = sample_trials(space, BASE, 200, seed=5)
    assert drawn == sample_trials(space, BASE, 200, seed=5) != sample_trials(space, BASE, 200, seed=6)
    assert drawn[0] == {key: getattr(BASE, key) for key in space}  # what the search is compared with
    assert sample_trials(space, BASE, 1, seed=5) == drawn[:1]
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
    drawn = sample_trials(space, BASE, 6, seed=0)
    assert len({tuple(each.items()) for each in drawn}) == 6
    with pytest.raises(UserError, match="--trials 7: the space has only 6 combinations; use --trials 6"):
        sample_trials(space, BASE, 7, seed=0)


def test_a_key_without_an_effect_is_not_drawn_and_makes_no_other_trial():
    values = {"loss": ["corn", "soft_ordinal", "cross_entropy"], "label_smoothing": [0.05, 0.1]}
    values["softness"] = [0.5, 1.0, 2.0]
    space = parse_space(values, "mine", BASE)
    drawn = sample_trials(space, BASE, 7, seed=0)
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
        sample_trials(space, BASE, 8, seed=0)


def test_settings_that_resolve_to_the_same_training_are_one_trial():
    space = parse_space(
        {"augment": ["auto", "flips", "dihedral"], "batch_norm": ["auto", "worker", "sync"]}, "mine", BASE
    )
    with pytest.raises(UserError, match="the space has only 2 combinations"):  # of one worker alone
        sample_trials(space, BASE, 9, seed=0)
    two_workers = sample_trials(space, BASE, 4, seed=0, workers=2)
    assert len({(each["augment"] == "dihedral", each["batch_norm"] == "worker") for each in two_workers}) == 4


def test_fixed_settings_may_leave_keys_without_an_effect():
    base = load_recipe("default", RECIPES, ["loss=corn"])
    space = load_space("default", SPACES, base, fixed={"loss"})
    assert "learning_rate" in space and "label_smoothing" not in space
    other = with_settings(base, {"loss": "cross_entropy"}, "a trial")
    assert other.label_smoothing == 0.05  # the default with that loss, not what it is with corn
    base = load_recipe("default", RECIPES, ["label_smoothing=0.2"])
    space = load_space("default", SPACES, base, fixed={"label_smoothing"})
    recipes = [
        with_settings(base, settings, "a trial") for settings in sample_trials(space, base, 30, seed=0)
    ]
    assert {(recipe.loss, recipe.label_smoothing) for recipe in recipes} == {
        ("cross_entropy", 0.2), ("weighted_cross_entropy", 0.2), ("corn", 0.0), ("soft_ordinal", 0.0)
    }  # fmt: skip


def test_values_that_do_not_go_together_are_refused_before_anything_starts():
    base = load_recipe("smoke", RECIPES, ["epochs=3"])
    space = parse_space({"frozen_epochs": [0, 2]}, "mine", base)
    with pytest.raises(UserError, match="trial .*of the space: frozen_epochs"):
        sample_trials(space, base.model_copy(update={"epochs": 2}), 2, seed=0)
