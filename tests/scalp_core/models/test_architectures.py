"""Architectures whose bundle and forward passes are tested; docs/training.md lists the same."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from jobs.train.driver import check_batch_norm
from jobs.train.initial_state import make_initial_state
from scalp_core.errors import UserError
from scalp_core.inference import torch_runtime
from scalp_core.inference.torch_runtime import TorchRuntime
from scalp_core.models.architecture import build_model, preprocess_for
from scalp_core.models.recipe import Recipe

# Architecture to a small input that it takes: tests of structure, with random weights.
CONVOLUTIONAL = {
    "legacy_xception": 64,
    "xception41p.ra3_in1k": 64,
    "resnet10t": 64,
    "regnetx_002": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "lcnet_050": 64,
    "ghostnet_050": 64,
    "hardcorenas_a": 64,
    "convnext_atto": 64,
    "edgenext_xx_small": 64,
    "mobilevit_xxs": 64,
}
ATTENTION = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
    "deit_tiny_distilled_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 64,
    "levit_128s": 64,
    "coat_lite_tiny": 64,
}
TESTED = CONVOLUTIONAL | ATTENTION


# With and without batch normalization, and attention; the others run in the night.
_FAST = {"legacy_xception", "convnext_atto", "vit_tiny_patch16_224"}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        pytest.param(name, size, marks=[] if name in _FAST else pytest.mark.slow)
        for name, size in TESTED.items()
    ],
)
def test_initial_weights_become_a_bundle(architecture, size):
    start = make_initial_state(Recipe(architecture=architecture, weights="none", size=size))
    heat_maps = not any("has no heatmaps" in note for note in start.notes)
    assert heat_maps == (architecture in CONVOLUTIONAL)


def test_the_docs_list_the_tested_architectures():
    text = Path(__file__).parents[3].joinpath("docs/training.md").read_text()
    (listed,) = re.findall(r"Tested are (.*?)\.\n", text, re.DOTALL)
    assert re.findall(r"`([^`]+)`", listed) == list(TESTED)


@pytest.mark.parametrize("architecture", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_two_heads_with_corn_are_refused_in_one_line(architecture):
    with pytest.raises(UserError, match="loss corn needs one head"):
        make_initial_state(Recipe(architecture=architecture, weights="none", loss="corn"))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("nest_tiny_jx", "does not support 33 px.*--set size=224"),
        ("test_vit", "at 33 px cannot become a bundle.*divisible"),
    ],
)
def test_a_size_that_does_not_suit_an_architecture_is_refused(architecture, reason):
    with pytest.raises(UserError, match=reason):
        make_initial_state(Recipe(architecture=architecture, weights="none", size=33))


def test_an_architecture_that_fails_at_the_end_is_refused_at_the_start(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("an operation is unknown")

    monkeypatch.setattr("openvino.convert_model", failing)
    with pytest.raises(UserError, match=r"test_resnet at 64 px cannot become a bundle.*an operation is unkn"):
        make_initial_state(Recipe(architecture="test_resnet", weights="none", size=64))


def untrained(architecture):
    """What `load_model` reads of a bundle, with random weights."""
    model = build_model(architecture)
    spec = SimpleNamespace(
        architecture=architecture, head="softmax", model={}, symptoms=1, preprocess=preprocess_for(model, 64)
    )
    return SimpleNamespace(spec=spec, state=model.state_dict())


def test_a_failure_to_fold_is_a_warning(monkeypatch, caplog):
    def failing(_):
        raise AttributeError("no folding")

    bundle = untrained("test_resnet")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    folded = TorchRuntime(bundle, "cpu", "fp32").logits(images)
    monkeypatch.setattr(torch_runtime, "fuse", failing)
    with caplog.at_level(logging.WARNING):
        unfolded = TorchRuntime(bundle, "cpu", "fp32").logits(images)
    assert "no folding" in caplog.text
    np.testing.assert_allclose(folded, unfolded, atol=1e-4)


@pytest.mark.parametrize("architecture", ["test_resnet", "lcnet_050"])  # heads of PyTorch and of timm
def test_the_head_stays_exact_in_bf16(architecture):
    runtime = TorchRuntime(untrained(architecture), "cpu", "bf16")
    inside = runtime._model.state_dict()  # no public part shows the precision of a layer
    head = {name: value for name, value in inside.items() if value.shape[:1] == (4,)}
    assert {value.dtype for value in head.values()} == {torch.float32}
    assert torch.bfloat16 in {value.dtype for value in inside.values()}


def test_weights_that_share_a_tensor_are_serialized():
    from scalp_core.bundles.bundle import load_weights, serialize_weights

    layer = nn.Linear(2, 2)
    state = nn.Sequential(layer, layer).state_dict()
    assert load_weights(serialize_weights(state)).keys() == state.keys()


@pytest.mark.medium
def test_a_setting_of_batch_normalization_needs_batch_normalization():
    recipe = Recipe(architecture="test_convnext", weights="none", size=64)
    has_batch_norm = make_initial_state(recipe).batch_norm
    check_batch_norm(recipe, has_batch_norm)
    with pytest.raises(UserError, match=r"batch_norm \(sync\) has no effect with.*test_convnext.*auto"):
        check_batch_norm(recipe.model_copy(update={"batch_norm": "sync"}), has_batch_norm)
