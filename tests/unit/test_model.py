import pytest
import safetensors.torch
import timm
import torch

from scalp_core import storage
from scalp_core.bundle import serialise_weights
from scalp_core.errors import UserError
from scalp_core.model import build_model, initial_model, normalise, preprocess_for
from scalp_core.preprocess import Preprocess
from scalp_core.recipe import DEFAULT_ARCHITECTURE


@pytest.fixture(scope="module")
def imagenet_like():
    """A model as the hub would deliver it: a thousand classes."""
    torch.manual_seed(1)
    return timm.create_model(DEFAULT_ARCHITECTURE, num_classes=1000)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_taken_and_the_head_is_new(imagenet_like, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(imagenet_like.state_dict(), path)
    else:
        safetensors.torch.save_file(imagenet_like.state_dict(), path)
    model = initial_model(DEFAULT_ARCHITECTURE, str(path), seed=0)
    assert model.get_classifier().out_features == 4
    for name, value in imagenet_like.state_dict().items():
        if not name.startswith("fc."):
            torch.testing.assert_close(model.state_dict()[name], value)


def test_weights_in_object_storage_are_taken(imagenet_like, s3):
    uri = "s3://scalp/weights/xception.safetensors"
    storage.write(uri, serialise_weights(imagenet_like.state_dict()))
    model = initial_model(DEFAULT_ARCHITECTURE, uri, seed=0)
    torch.testing.assert_close(model.conv1.weight, imagenet_like.conv1.weight)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="three ways"):
        initial_model(DEFAULT_ARCHITECTURE, str(tmp_path / "evil.pth"), seed=0)


def test_weights_of_another_architecture_are_refused(tmp_path):
    other = timm.create_model("resnet18", num_classes=4)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="three ways"):
        initial_model(DEFAULT_ARCHITECTURE, str(tmp_path / "other.safetensors"), seed=0)


def test_a_hub_that_cannot_be_reached_names_the_three_ways(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--weights FILE.*s3://.*--weights none"):
        initial_model(DEFAULT_ARCHITECTURE, "imagenet", seed=0)


def test_a_missing_file_and_an_unknown_architecture_are_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        initial_model(DEFAULT_ARCHITECTURE, str(tmp_path / "none.safetensors"), seed=0)
    with pytest.raises(UserError, match="no architecture 'xceptoin'"):
        build_model("xceptoin")


def test_from_scratch_the_seed_decides():
    first, second, third = (initial_model(DEFAULT_ARCHITECTURE, "none", seed) for seed in (1, 1, 2))
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, third.fc.weight)


def test_preprocessing_follows_the_weights(imagenet_like):
    assert preprocess_for(imagenet_like, 224) == Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert preprocess_for(timm.create_model("resnet18"), 64).mean == (0.485, 0.456, 0.406)


def test_normalising_maps_bytes_to_the_papers_range_in_channels_last():
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(4 * 4 * 3).reshape(2, 4, 4, 3)
    out = normalise(images, Preprocess(size=32))
    assert out.shape == (2, 3, 4, 4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[0], torch.full((3, 4, 4), -1.0))
    torch.testing.assert_close(out[1], torch.full((3, 4, 4), 1.0))
