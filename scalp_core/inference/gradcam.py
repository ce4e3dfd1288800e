"""Grad-CAM heatmaps: the parts of an image that raised the score of a grade. `overlay` draws them.

A heatmap shows where the model looked, not where the lesion is. A model that grades by hair or by light shows
hair or light, and heatmaps exist to reveal that.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from timm.layers import SelectAdaptivePool2d
from torch import nn

from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Device, resolve_device
from scalp_core.models.architecture import load_model, normalize, to_channels_last

# Images per pass. Captum stores the activations of all layers, so memory grows with it.
_CHUNK_SIZE = 8


class Explainer:
    """Compute heatmaps of a bundle by PyTorch in fp32; the same pixels give the same heatmap.

    Thread-safe: a lock admits one thread at a time.

    Raises:
        UserError: The device is unavailable, or the architecture has no feature map for Grad-CAM.
    """

    def __init__(self, bundle: Bundle, device: Device = "auto") -> None:
        self.spec = bundle.spec
        self.device = resolve_device(device)
        model = load_model(bundle).requires_grad_(False)
        self._model = to_channels_last(model.to(self.device))
        self._pool = _last_pool(model, self.spec.architecture)
        self._lock = threading.Lock()
        self.cells = self._find_cells()

    def heatmap(self, image: np.ndarray, grade: int | None = None) -> np.ndarray:
        """Compute the heatmap of a grade for one image.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            grade: Grade to explain; None: the likeliest one.

        Returns:
            float32 (size, size) in 0..1, interpolated between `cells`. 1 is the maximum of this image, so
            heat is not comparable between images. All zeros if no part raised the score of the grade.

        Raises:
            UserError: The grade does not exist.
        """
        return self.heatmaps(image[None], None if grade is None else [grade])[0]

    def heatmaps(self, images: np.ndarray, grades: Sequence[int] | None = None) -> np.ndarray:
        """Compute heatmaps, float32 (N, size, size), of images uint8 (N, size, size, 3) and N grades."""
        names = self.spec.grade_names
        if wrong := [grade for grade in grades or () if not 0 <= grade < len(names)]:
            raise UserError(f"grade {wrong[0]} does not exist; use a grade from 0 to {len(names) - 1}")
        if grades is not None and len(grades) != len(images):
            raise ValueError(f"{len(grades)} grades for {len(images)} images")
        heatmaps = [np.zeros((0, *images.shape[1:3]), np.float32)]
        for start in range(0, len(images), _CHUNK_SIZE):
            chunk = slice(start, start + _CHUNK_SIZE)
            with self._lock:
                heatmaps.append(self._compute(images[chunk], None if grades is None else grades[chunk]))
        return np.concatenate(heatmaps)

    def _compute(self, images: np.ndarray, grades: Sequence[int] | None) -> np.ndarray:
        target = None if grades is None else torch.tensor(grades, device=self.device)
        forward = self._model if grades is not None else lambda pixels: self._model(pixels).max(dim=1).values
        cam = LayerGradCam(forward, self._pool)
        # On GPUs, true fp32 and deterministic kernels.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            maps = cam.attribute(
                self._input(images), target, attribute_to_layer_input=True, relu_attributions=True
            )
            size = images.shape[1:3]
            heat = LayerAttribution.interpolate(maps, size, "bilinear")[:, 0].detach().cpu().numpy()
        heat[~np.isfinite(heat).all(axis=(1, 2))] = 0  # as if no part raised the score
        peak = heat.max(axis=(1, 2), keepdims=True)
        return np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)

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
        rows, columns = shapes[-1][2:]
        if rows * columns == 1:
            raise UserError(
                f"{self.spec.architecture} at {size} px has a feature map of one cell, so its heatmap is "
                "uniform; explain a bundle that was trained at a larger size"
            )
        return rows, columns


def _last_pool(model: nn.Module, architecture: str) -> nn.Module:
    """Find the pooling layer at the end of timm's convolutional models; its input is the last feature map."""
    pools: list[Any] = [module for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
    # Transformers have none, or pool over (1, 2) with channels last, whose windows attend to each other.
    if not pools or getattr(pools[-1].pool, "dim", (2, 3)) != (2, 3):
        raise UserError(
            f"{architecture} has no convolutional feature map, which Grad-CAM needs; explain a bundle "
            "of a convolutional architecture, such as legacy_xception"
        )
    return pools[-1]
