"""Grad-CAM by PyTorch: for GPUs, and for architectures whose graph `class_activation` cannot explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import nn

from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.inference.heatmaps import Explainer
from scalp_core.inference.predictor import Device, resolve_device
from scalp_core.models.architecture import load_model, normalize, to_channels_last
from scalp_core.models.timm_import import timm


class TorchExplainer(Explainer):
    """Explain by the weights of a bundle.

    Raises:
        UserError: The device is unavailable, or the architecture has no feature map for Grad-CAM.
    """

    def __init__(self, bundle: Bundle, device: Device = "auto") -> None:
        super().__init__(bundle)
        self.device = resolve_device(device)
        model = load_model(bundle).requires_grad_(False)
        self._model = to_channels_last(model.to(self.device))
        self._pool = _last_pool(model, self.spec.architecture)
        self.cells = self._find_cells()
        self._check_cells()

    def _maps(self, images: np.ndarray, grades: Sequence[int] | None) -> np.ndarray:
        target = None if grades is None else torch.tensor(grades, device=self.device)
        forward = self._model if grades is not None else self._largest_logit
        cam = LayerGradCam(forward, self._pool)
        # On GPUs, true fp32 and deterministic kernels.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            maps = cam.attribute(
                self._input(images), target, attribute_to_layer_input=True, relu_attributions=True
            )
        return maps[:, 0].detach().cpu().numpy()

    def _largest_logit(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model(pixels)[:, :NUM_GRADES].max(dim=1).values

    def _input(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        return normalize(pixels, self.spec.preprocess)

    def _find_cells(self) -> tuple[int, int]:
        """Find the rows and columns of the feature map by a forward pass of a blank image."""
        shapes: list[torch.Size] = []
        hook = self._pool.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        size = self.spec.preprocess.size
        with hook, torch.inference_mode():
            self._model(self._input(np.zeros((1, size, size, 3), np.uint8)))
        return shapes[-1][2], shapes[-1][3]


def _last_pool(model: nn.Module, architecture: str) -> nn.Module:
    """Find the pooling layer at the end of timm's convolutional models; its input is the last feature map."""
    last_layer = timm.layers.SelectAdaptivePool2d
    pools: list[Any] = [module for module in model.modules() if isinstance(module, last_layer)]
    # Transformers have none, or pool over (1, 2) with channels last, whose windows attend to each other.
    if not pools or getattr(pools[-1].pool, "dim", (2, 3)) != (2, 3):
        raise UserError(
            f"{architecture} has no convolutional feature map, which Grad-CAM needs; explain a bundle "
            "of a convolutional architecture, such as legacy_xception"
        )
    return pools[-1]
