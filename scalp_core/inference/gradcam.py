"""Where the model looked: Grad-CAM heatmaps of a grade. `heat` makes pictures of them.

A heatmap says which parts of the photograph spoke for a grade in this model. It does not say where the lesion
is: a model that grades by hair or by light shows hair or light, and that is what it is for.
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
from scalp_core.models.architecture import build_model, normalize, to_channels_last

# Captum keeps the activations of all layers, so that memory grows with this.
_PIECE = 8


class Explainer:
    """Makes heatmaps of a bundle's weights by PyTorch, in fp32; the same pixels give the same map.

    May be shared by threads: they take turns.

    Args:
        bundle: the loaded bundle.
        device: where the model runs.

    Raises:
        UserError: the device is not there, or the architecture has no map of the picture to show.
    """

    def __init__(self, bundle: Bundle, device: Device = "auto") -> None:
        self.spec = bundle.spec
        self.device = resolve_device(device)
        model = build_model(self.spec.architecture, self.spec.head, self.spec.preprocess.size).eval()
        model.load_state_dict(bundle.state)
        model.requires_grad_(False)
        self._model = to_channels_last(model.to(self.device))
        self._pool = _last_pool(model, self.spec.architecture)
        self._turn = threading.Lock()
        self.cells = self._find_cells()

    def heatmap(self, image: np.ndarray, grade: int | None = None) -> np.ndarray:
        """What spoke for a grade in one photograph.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            grade: the one to explain; None takes the likeliest.

        Returns:
            float32 (size, size) in 0..1, smooth between `cells`; 1 is the strongest place of this photograph,
            so heat does not compare between photographs. All zeros where nothing spoke for the grade.

        Raises:
            UserError: there is no such grade.
        """
        return self.heatmaps(image[None], None if grade is None else [grade])[0]

    def heatmaps(self, images: np.ndarray, grades: Sequence[int] | None = None) -> np.ndarray:
        """As `heatmap`, of uint8 (N, size, size, 3) and N grades: float32 (N, size, size)."""
        names = self.spec.grade_names
        if wrong := [grade for grade in grades or () if not 0 <= grade < len(names)]:
            raise UserError(f"there is no grade {wrong[0]} to explain; grades are 0 to {len(names) - 1}")
        if grades is not None and len(grades) != len(images):
            raise ValueError(f"{len(grades)} grades for {len(images)} images")
        found = [np.zeros((0, *images.shape[1:3]), np.float32)]
        for start in range(0, len(images), _PIECE):
            piece = slice(start, start + _PIECE)
            with self._turn:
                found.append(self._piece(images[piece], None if grades is None else grades[piece]))
        return np.concatenate(found)

    def _piece(self, images: np.ndarray, grades: Sequence[int] | None) -> np.ndarray:
        target = None if grades is None else torch.tensor(grades, device=self.device)
        cam = LayerGradCam(self._likeliest if target is None else self._model, self._pool)
        with _exact():
            maps = cam.attribute(
                self._input(images), target, attribute_to_layer_input=True, relu_attributions=True
            )
            size = images.shape[1:3]
            heat = LayerAttribution.interpolate(maps, size, "bilinear")[:, 0].detach().cpu().numpy()
        heat[~np.isfinite(heat).all(axis=(1, 2))] = 0  # as where nothing spoke for the grade
        peak = heat.max(axis=(1, 2), keepdims=True)
        return np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)

    def _likeliest(self, images: torch.Tensor) -> torch.Tensor:
        return self._model(images).max(dim=1).values

    def _input(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        return normalize(pixels, self.spec.preprocess)

    def _find_cells(self) -> tuple[int, int]:
        """Rows and columns of the map, found by running a blank picture."""
        shapes: list[torch.Size] = []
        hook = self._pool.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        size = self.spec.preprocess.size
        with hook, torch.inference_mode():
            self._model(self._input(np.zeros((1, size, size, 3), np.uint8)))
        rows, columns = shapes[-1][2:]
        if rows * columns == 1:
            raise UserError(
                f"{self.spec.architecture} at {size} px ends in one cell for the whole picture, which leaves "
                "nothing to show; explain a bundle that was trained at a larger size"
            )
        return rows, columns


def _last_pool(model: nn.Module, architecture: str) -> nn.Module:
    """The pooling that ends timm's convolutional models; its input is the last map of the picture."""
    pools: list[Any] = [module for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
    # Transformers have none, or pool over (1, 2) with the channels last: windows that attend to each other.
    if not pools or getattr(pools[-1].pool, "dim", (2, 3)) != (2, 3):
        raise UserError(
            f"{architecture} has no convolutional map of the picture, which Grad-CAM needs; explain a bundle "
            "of a convolutional architecture, such as legacy_xception"
        )
    return pools[-1]


def _exact() -> Any:
    """cuDNN in fp32 proper, by the same kernels each time; CPUs are so anyway."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
