"""The search space of `scalp tune`."""

import pytest

from jobs.train.driver import RECIPES
from jobs.tune.driver import SPACES
from scalp_core.errors import UserError
from scalp_core.models.recipe import load_recipe
from scalp_core.models.search_space import load_space, parse_space
from scalp_core.settings import parse_overrides

BASE = load_recipe("smoke", RECIPES, [])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learnig_rate": [1]}, "mine: unknown key 'learnig_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": {"low": 1, "hihg": 2}}, "learning_rate: unknown key 'hihg'; did you mean 'high'"),
        ({"learning_rate": {"low": 1}}, "mine: learning_rate: high is missing; add it"),
        ({"learning_rate": {"low": 2, "high": 1}}, r"low \(2\) must be less than high \(1\)"),
        ({"learning_rate": {"low": 1, "high": float("inf")}}, "both finite"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "log"}}, r"low \(0\) must be more than 0"),
        ({"weight_decay": {"low": 0, "high": 1, "scale": "exp"}}, "scale: 'exp' is invalid; scale must be"),
        ({"label_smoothing": {"low": 0, "high": 2}}, "mine: label_smoothing: 2.* must be less than 1"),
        ({"loss": ["corn", "focal"]}, "mine: loss: 'focal' is invalid; loss must be 'cross_"),
        ({"loss": {"low": 0, "high": 1}}, "mine: loss is not a number"),
        ({"batch_norm": {"low": 0, "high": 1}}, "mine: batch_norm is not a number"),
        ({"batch_size": {"low": 8.5, "high": 16}}, "mine: batch_size: 8.5 is invalid; batch_size must be"),
        ({"learning_rate": 0.1}, "mine: learning_rate has no values; write a list such as"),
        ({"learning_rate": []}, "mine: learning_rate has no values; write a list such as"),
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
    with pytest.raises(UserError, match="is not a list of settings"):
        load_space(str(path), SPACES, BASE)
