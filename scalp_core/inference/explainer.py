"""Choose how the heatmaps of a bundle are computed."""

from __future__ import annotations

from scalp_core.bundles.bundle import Bundle
from scalp_core.inference.class_activation import GraphExplainer, find_head
from scalp_core.inference.heatmaps import Explainer
from scalp_core.inference.predictor import Device, resolve_device


def make_explainer(bundle: Bundle, device: Device = "auto") -> Explainer:
    """Make the explainer of a bundle: its graph on CPUs where that suffices, which needs no PyTorch.

    Args:
        bundle: Loaded bundle.
        device: Device of the model: auto, cpu or cuda.

    Raises:
        UserError: The device is unavailable, or the architecture has no feature map for Grad-CAM.
    """
    head = None
    if resolve_device(device) == "cpu" and bundle.spec.offers("float"):
        head = find_head(bundle.graph("float"), bundle.spec.head)
    if head:
        return GraphExplainer(bundle, head)
    from scalp_core.inference.gradcam import TorchExplainer  # PyTorch takes seconds to import

    return TorchExplainer(bundle, device)
