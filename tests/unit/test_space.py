"""What `scalp tune` may vary, and what it draws."""

import pytest

from jobs.train import RECIPES
from jobs.tune import SPACES
from scalp_core.errors import UserError
from scalp_core.recipe import Recipe, load_recipe
from scalp_core.space import draw, load_space, parse_space

BASE = load_recipe("smoke", RECIPES, [])


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_that_is_shipped_draws_recipes(path):
    space = load_space(path.stem, SPACES, BASE)
    for settings in draw(space, BASE, 50, seed=1):
        assert Recipe(**BASE.model_dump() | settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learnig_rate": [1]}, "mine: unknown key 'learnig_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": {"low": 1, "hihg": 2}}, "learning_rate: unknown key 'hihg'; did you mean 'high'"),
        ({"learning_rate": {"low": 1}}, "mine: learning_rate: high: Field required"),
        ({"learning_rate": {"low": 2, "high": 1}}, r"low \(2\) must be less than high \(1\)"),
        ({"learning_rate": {"low": 1, "high": float("inf")}}, "both be numbers"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "log"}}, r"low \(0\) must be more than 0"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "exp"}}, "weight_decay: scale: Input should be"),
        ({"label_smoothing": {"low": 0, "high": 2}}, "mine: label_smoothing: Input should be less than 1"),
        ({"loss": ["corn", "focal"]}, "mine: loss: Input should be 'cross_entropy'"),
        ({"loss": {"low": 0, "high": 1}}, "mine: loss is no number"),
        ({"batch_norm": {"low": 0, "high": 1}}, "mine: batch_norm is no number"),
        ({"batch_size": {"low": 8.5, "high": 16}}, "mine: batch_size: Input should be a valid integer"),
        ({"learning_rate": 0.1}, "mine: learning_rate: write a list such as"),
        ({"learning_rate": []}, "mine: learning_rate: write a list such as"),
        ({"ema_decay": [0, 0.0]}, "mine: ema_decay: a value is there twice"),
        ({"epochs": [1, 2]}, "mine: epochs cannot vary"),
        ({"frozen_epochs": [0, 6]}, r"mine: frozen_epochs \(6\) must be fewer than epochs \(6\)"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_in_a_line_that_names_the_key(values, words):
    with pytest.raises(UserError, match=words) as refused:
        parse_space(values, "mine", BASE)
    assert "\n" not in str(refused.value)


def test_files_and_names_of_spaces(tmp_path):
    with pytest.raises(UserError, match="no space 'wide'; give one of default"):
        load_space("wide", SPACES, BASE)
    path = tmp_path / "mine.yaml"
    path.write_text("loss: [corn, cross_entropy]\nlearning_rate: {low: 1e-4, high: 3e-3, scale: log}\n")
    assert list(load_space(str(path), SPACES, BASE)) == ["loss", "learning_rate"]
    assert list(load_space(str(path), SPACES, BASE, fixed={"loss"})) == ["learning_rate"]
    with pytest.raises(UserError, match="nothing is left to vary"):
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
    drawn = draw(space, BASE, 200, seed=5)
    assert drawn == draw(space, BASE, 200, seed=5) != draw(space, BASE, 200, seed=6)
    assert drawn[0] == {key: getattr(BASE, key) for key in space}  # what the search is compared with
    assert draw(space, BASE, 1, seed=5) == drawn[:1]
    drawn = drawn[1:]
    rates = [each["learning_rate"] for each in drawn]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-3 < max(rates) <= 1e-2
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.6  # half of them in each power of ten
    assert {each["batch_size"] for each in drawn} == {4, 5, 6, 7, 8}
    assert all(type(each["batch_size"]) is int for each in drawn)
    assert {each["loss"] for each in drawn} == {"corn", "cross_entropy"}


def test_no_two_trials_are_alike_and_a_small_space_says_how_many_it_has():
    space = parse_space(
        {"loss": ["corn", "cross_entropy"], "accumulate": {"low": 1, "high": 3}}, "mine", BASE
    )
    drawn = draw(space, BASE, 6, seed=0)
    assert len({tuple(each.items()) for each in drawn}) == 6
    with pytest.raises(UserError, match="--trials 7: the space has only 6 combinations; use --trials 6"):
        draw(space, BASE, 7, seed=0)


def test_values_that_do_not_go_together_are_refused_before_anything_starts():
    base = load_recipe("smoke", RECIPES, ["epochs=3"])
    space = parse_space({"frozen_epochs": [0, 2]}, "mine", base)
    with pytest.raises(UserError, match="trial . of the space: frozen_epochs"):
        draw(space, base.model_copy(update={"epochs": 2}), 2, seed=0)
