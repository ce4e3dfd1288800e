import re

import pytest
import torch
import yaml

from jobs.train.driver import RECIPES
from scalp_core.bundles.registry import ENVIRONMENT, Registry
from scalp_core.errors import UserError
from scalp_core.models.architecture import build_model
from scalp_core.models.recipe import CONDITIONS, Recipe, load_recipe, recipe_of_bundle


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_is_valid(path):
    assert isinstance(load_recipe(path.stem, RECIPES, []), Recipe)


def test_overrides_win_and_keep_their_types():
    recipe = load_recipe("smoke", RECIPES, ["epochs=3", "learning_rate=2e-4", "augment=x4"])
    assert (recipe.epochs, recipe.learning_rate, recipe.augment) == (3, 2e-4, "x4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epoch=3"], "unknown key 'epoch'; did you mean 'epochs'"),
        (["learnig_rate=1"], "did you mean 'learning_rate'"),
        (["epochs=0"], "^--set epochs=0 is invalid; epochs must be greater than or equal to 1$"),
        (["epochs=many"], "^--set epochs=many is invalid; epochs must be a valid integer$"),
        (["loss=l2"], "^--set loss=l2 is invalid; loss must be 'cross_entropy', "),
        (["zzz=1"], "^--set zzz=1: unknown key 'zzz'; docs/settings.md lists all keys$"),
        (["model={a: 1"], "^--set model={a: 1 is not valid YAML .*; close brackets"),
        (["epochs"], "write --set key=value"),
    ],
)
def test_a_wrong_override_is_named(overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe("smoke", RECIPES, overrides)


def test_users_recipe_file_is_validated(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("weights: none\nsize: 96\n")
    assert load_recipe(str(path), RECIPES, []).size == 96
    path.write_text("wieghts: none\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'wieghts'; did you mean 'weights'"):
        load_recipe(str(path), RECIPES, [])
    path.write_text("epochs: many\n")
    with pytest.raises(UserError, match=r"mine\.yaml: epochs: 'many' is invalid; epochs must be a valid"):
        load_recipe(str(path), RECIPES, [])
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(str(path), RECIPES, [])


def test_old_spellings_of_keys_are_accepted(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optimiser: adam\ncolour_jitter: 0.2\n")
    expected = Recipe(optimizer="adam", color_jitter=0.2)
    assert load_recipe(str(path), RECIPES, []) == expected
    path.write_text("optimizer: adamw\n")
    assert load_recipe(str(path), RECIPES, ["optimiser=adam", "colour_jitter=0.2"]) == expected
    old = {**expected.model_dump(), "optimiser": "adam", "colour_jitter": 0.2}
    del old["optimizer"], old["color_jitter"]
    assert Recipe(**old) == expected  # the recipe of an older bundle


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(UserError, match="give one of cpu, default, eight-gpus, one-gpu, paper, smoke"):
        load_recipe("fast", RECIPES, [])


def test_the_paper_s_recipe_is_the_paper_s():
    recipe = load_recipe("paper", RECIPES, [])
    assert (recipe.architecture, recipe.size, recipe.resize) == ("legacy_xception", 224, "squash")
    assert (recipe.optimizer, recipe.learning_rate, recipe.schedule) == ("adam", 1e-3, "constant")
    assert (recipe.loss, recipe.batch_size, recipe.color_jitter) == ("cross_entropy", 16, 0)
    assert (recipe.frozen_epochs, recipe.epochs, recipe.augment) == (10, 30, "dihedral")


@pytest.mark.parametrize("name", ["cpu", "one-gpu", "eight-gpus"])
def test_recipes_for_hardware_build_their_architecture(name):
    recipe = load_recipe(name, RECIPES, [])
    with torch.device("meta"):
        model = build_model(recipe.architecture, recipe.head, recipe.size, recipe.model)
    assert model(torch.zeros(1, 3, recipe.size, recipe.size, device="meta")).shape == (1, 4)
    # Flakes keep their shape. `cpu` reads the whole image; `auto` has no quarter turns for `squash`.
    assert recipe.resize == ("squash" if name == "cpu" else "crop") and recipe.augment == "auto"
    assert (recipe.frozen_epochs, recipe.layer_decay < 1) == ((0, False) if name == "cpu" else (1, True))


def test_keywords_of_timm_reach_the_model_and_invalid_ones_are_refused():
    recipe = load_recipe("smoke", RECIPES, ["architecture=test_resnet", "model={drop_rate: 0.25}"])
    assert build_model(recipe.architecture, keywords=recipe.model).drop_rate == 0.25
    with pytest.raises(
        UserError, match=r"timm cannot build test_resnet with model: {'drop_rat': 1}.*drop_rat"
    ):
        build_model("test_resnet", keywords={"drop_rat": 1})
    for reserved in ("checkpoint_path", "num_classes", "pretrained_cfg"):  # the first would read a pickle
        with pytest.raises(UserError, match=f"^--set model=.*: scalp sets {reserved}; omit it"):
            load_recipe("smoke", RECIPES, [f"model={{{reserved}: x}}"])


def test_unknown_architecture_is_refused_with_a_like_name_only():
    with pytest.raises(UserError, match=r"no architecture 'resnet8'; did you mean 'resnet\d+'\?$"):
        build_model("resnet8")
    with pytest.raises(UserError, match=r"no architecture 'zzz'; use \w+, or a name that timm.list_models"):
        build_model("zzz")


def test_a_recipe_in_which_nothing_but_the_last_layer_would_learn_is_refused():
    with pytest.raises(
        UserError,
        match=r"^--set frozen_epochs=30: frozen_epochs \(30\) must be fewer than epochs \(30\); set",
    ):
        load_recipe("paper", RECIPES, ["frozen_epochs=30"])


REFUSED = {
    ("loss=corn", "label_smoothing=0.1"): "label_smoothing (0.1) has no effect with loss: corn; use "
    "label_smoothing=0, or loss=cross_entropy or loss=weighted_cross_entropy",
    ("softness=2",): "softness (2) has no effect with loss: cross_entropy; use softness=1, or "
    "loss=soft_ordinal",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_setting_without_an_effect_is_refused_with_advice(overrides):
    with pytest.raises(UserError, match=re.escape(REFUSED[overrides])) as refused:
        load_recipe("default", RECIPES, list(overrides))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["default", "paper", "smoke"])
@pytest.mark.parametrize("loss", ["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"])
def test_recipe_with_any_loss_survives_yaml(name, loss, tmp_path):
    recipe = load_recipe(name, RECIPES, [f"loss={loss}"])
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump()))
    assert load_recipe(str(path), RECIPES, []) == Recipe(**recipe.model_dump()) == recipe
    for condition in CONDITIONS:
        if loss not in condition.values:
            assert getattr(recipe, condition.setting) == condition.neutral


def test_default_label_smoothing_depends_on_the_loss():
    assert [Recipe(loss=loss).label_smoothing for loss in ("cross_entropy", "corn")] == [0.05, 0.0]


def test_the_learning_rate_warms_up_and_then_follows_the_schedule():
    def rates(schedule, warmup_share=0.1):
        recipe = Recipe(schedule=schedule, warmup_share=warmup_share)
        return [recipe.learning_rate_factor(step, 100) for step in range(101)]

    for schedule in ("cosine", "trapezoid", "constant"):
        assert rates(schedule)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert rates(schedule)[10] == 1.0
    assert rates("cosine")[55] == pytest.approx(0.5)
    assert rates("cosine")[100] == pytest.approx(0)
    assert rates("trapezoid")[10:74] == [1.0] * 64
    assert rates("trapezoid")[-27:] == pytest.approx([(100 - step) / 27 for step in range(74, 101)])
    assert rates("constant", 0.0) == [1.0] * 101


def test_the_learning_rate_warms_up_again_when_all_layers_learn():
    recipe = Recipe(epochs=10, frozen_epochs=2, schedule="cosine", warmup_share=0.1)
    rates = [recipe.learning_rate_factor(step, 100) for step in range(101)]
    assert rates[:2] == [0.5, 1.0] and rates[2:20] == [1.0] * 18
    assert rates[20:28] == pytest.approx([(step + 1) / 8 for step in range(8)])
    assert rates[28] == 1.0 and rates[64] == pytest.approx(0.5) and rates[100] == pytest.approx(0)


def test_the_recipe_of_a_bundle_continues_its_training(make_bundle, tmp_path, monkeypatch):
    folder = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "registry"))
    registry = Registry(str(tmp_path / "registry"))
    registry.add(str(folder), "scalp")
    recipe = recipe_of_bundle("models://scalp@latest", ["learning_rate=1e-5"])
    assert (recipe.weights, recipe.frozen_epochs) == ("models://scalp@1", 0)  # also after a next version
    assert (recipe.epochs, recipe.learning_rate) == (1, 1e-5)  # of the bundle, and the override
    assert recipe_of_bundle(str(folder), []).weights == str(folder)
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        recipe_of_bundle(str(folder), ["epoch=2"])
