"""Heatmaps of a graph equal those of PyTorch's gradients, and need no PyTorch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from jobs.common.graphs import with_float_graph
from scalp_core.inference.class_activation import GraphExplainer
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.gradcam import TorchExplainer
from scalp_core.inference.predictor import Predictor
from scalp_core.models.architecture import build_model, load_model, normalize
from tests.scalp_core.inference.test_gradcam import bundle_of, photographs


def bundle_with_graph(architecture: str, size: int, head: str, keywords=None):
    torch.manual_seed(1)
    model = build_model(architecture, head, keywords=keywords)
    for module in model.modules():  # gives untrained networks answers that differ
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    loaded = bundle_of(model, architecture, size)
    spec = loaded.spec.model_copy(update={"head": head, "model": keywords or {}})
    bundle = type(loaded)(spec, files=loaded.files)
    return with_float_graph(bundle, iter([(photographs(2, size), np.arange(2))]))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("architecture", "size", "head"),
    [
        ("legacy_xception", 96, "corn"),
        ("test_efficientnet", 96, "softmax"),
        ("test_resnet", 96, "softmax"),
    ],
)
def test_heatmaps_of_the_graph_are_those_of_gradients(architecture, size, head):
    bundle = bundle_with_graph(architecture, size, head)
    explainer, reference = make_explainer(bundle, "cpu"), TorchExplainer(bundle, "cpu")
    assert isinstance(explainer, GraphExplainer)
    assert explainer.cells == reference.cells
    images = photographs(3, size)
    expected = [reference.heatmaps(images, [grade] * 3) for grade in range(4)]
    found = [explainer.heatmaps(images, [grade] * 3) for grade in range(4)]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.array(expected).any()
    np.testing.assert_allclose(explainer.heatmaps(images), reference.heatmaps(images), atol=2e-3)


@pytest.mark.medium
@pytest.mark.parametrize("architecture", ["convnext_atto", "mobilenetv3_small_050"])
def test_layers_after_the_pool_are_left_to_gradients(architecture):
    explainer = make_explainer(bundle_with_graph(architecture, 96, "softmax"), "cpu")
    assert isinstance(explainer, TorchExplainer)
    assert explainer.heatmaps(photographs(1, 96)).shape == (1, 96, 96)


@pytest.mark.medium
def test_a_bundle_with_gem_has_the_answers_of_pytorch_and_the_heatmaps_of_gradients():
    bundle = bundle_with_graph("test_resnet", 96, "softmax", {"global_pool": "gem"})
    images = photographs(3, 96)
    with torch.inference_mode():
        expected = load_model(bundle)(normalize(torch.from_numpy(images), bundle.spec.preprocess))
    np.testing.assert_allclose(Predictor(bundle, "cpu", "fp32").logits(images), expected, atol=1e-4)
    explainer = make_explainer(bundle, "cpu")
    assert isinstance(explainer, TorchExplainer)
    assert any(np.ptp(explainer.heatmaps(images, [grade] * 3)) > 0 for grade in range(4))


@pytest.mark.medium
def test_a_heatmap_of_a_bundle_does_not_import_pytorch(bundle):
    code = (
        "import sys, numpy as np\n"
        "from scalp_core.bundles.loading import load_bundle\n"
        "from scalp_core.inference.explainer import make_explainer\n"
        f"bundle = load_bundle({str(bundle)!r})\n"
        "size = bundle.spec.preprocess.size\n"
        "make_explainer(bundle, 'cpu').heatmap(np.zeros((size, size, 3), np.uint8))\n"
        "assert not sys.modules.keys() & {'torch', 'captum'} and not sys.modules['openvino_telemetry']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
