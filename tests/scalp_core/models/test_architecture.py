import pytest
import timm
import torch

from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.architecture import build_model, normalize, preprocess_for
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE


@pytest.fixture(scope="module")
def imagenet_like():
    """A model with a thousand classes, as on the hub."""
    torch.manual_seed(1)
    return timm.create_model(DEFAULT_ARCHITECTURE, num_classes=1000)


def test_preprocessing_follows_the_weights(imagenet_like):
    assert preprocess_for(imagenet_like, 224) == Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert preprocess_for(timm.create_model("resnet18"), 64).mean == (0.485, 0.456, 0.406)


@pytest.mark.medium
def test_normalizing_maps_bytes_to_the_papers_range_in_channels_last():
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(4 * 4 * 3).reshape(2, 4, 4, 3)
    out = normalize(images, Preprocess(size=32))
    assert out.shape == (2, 3, 4, 4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[0], torch.full((3, 4, 4), -1.0))
    torch.testing.assert_close(out[1], torch.full((3, 4, 4), 1.0))


def test_gem_is_the_mean_of_cubes_and_takes_the_weights_of_the_average_pool():
    gem = build_model("test_resnet", keywords={"global_pool": "gem"}).eval()
    assert gem.state_dict().keys() == build_model("test_resnet").state_dict().keys()
    with torch.inference_mode():
        features = gem.forward_features(torch.randn(2, 3, 96, 96))
        pooled = gem.forward_head(features, pre_logits=True)
    expected = features.double().clamp(min=0).pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=1e-4)


def test_gem_needs_a_feature_map():
    with pytest.raises(UserError, match="vit_tiny_patch16_224 has no average pool over a feature map"):
        build_model("vit_tiny_patch16_224", keywords={"global_pool": "gem"})
