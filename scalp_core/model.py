"""The classifier: a timm architecture with a four-unit head, and where its first weights come from."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.preprocess import Preprocess, Resize

DEFAULT_ARCHITECTURE = "legacy_xception"


def build_model(architecture: str) -> nn.Module:
    """The architecture with random weights and four outputs.

    Raises:
        UserError: timm knows no such architecture.
    """
    if not timm.is_model(architecture):
        raise UserError(f"timm has no architecture {architecture!r}; try {DEFAULT_ARCHITECTURE}")
    return timm.create_model(architecture, num_classes=NUM_GRADES)


def preprocess_for(model: nn.Module, size: int, resize: Resize = "squash") -> Preprocess:
    """The preprocessing that belongs to the architecture's weights (timm), at the chosen size and fit."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return Preprocess(size=size, resize=resize, mean=config["mean"], std=config["std"])


def normalise(images: torch.Tensor, spec: Preprocess) -> torch.Tensor:
    """uint8 (N, size, size, 3) to float32 (N, 3, size, size) in channels_last memory, on the same device."""
    mean, scale = _constants(spec, images.device)
    # Permuting an NHWC tensor is channels_last already: no copy is made for the layout.
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _constants(spec: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept: a copy to the GPU at each call would be slow, and is not allowed while a CUDA graph is captured.
    with torch.inference_mode(False):
        mean = torch.tensor(spec.mean, device=device) * 255
        return mean, 1 / (torch.tensor(spec.std, device=device) * 255)


def initial_model(architecture: str, weights: str, seed: int) -> nn.Module:
    """The model that training starts from.

    Args:
        architecture: a timm name.
        weights: `imagenet` (from timm's hub), `none` (random, by `seed`), a local `.safetensors` or `.pth`
            file, or `s3://…` of one. A head of another size in the file is replaced by a new one.

    Raises:
        UserError: the weights cannot be had or do not fit. Training never starts from scratch unasked.
    """
    torch.manual_seed(seed)
    if weights == "none":
        return build_model(architecture)
    build_model(architecture)  # so that a wrong name is reported as such
    try:
        if weights == "imagenet":
            return timm.create_model(architecture, pretrained=True, num_classes=NUM_GRADES)
        return _from_file(architecture, weights)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(_no_weights(architecture, weights, reason)) from error


def _from_file(architecture: str, weights: str) -> nn.Module:
    suffix = Path(weights).suffix
    if suffix not in (".safetensors", ".pth"):
        raise UserError(f"--weights {weights}: give imagenet, none, or a .safetensors or .pth file")
    data = storage.read(storage.absolute(weights))
    # timm reads from a path; it unpickles with weights_only, and fits the head to four units.
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        return timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg_overlay={"file": file.name, "hf_hub_id": None, "url": ""},
            num_classes=NUM_GRADES,
        )


def _no_weights(architecture: str, weights: str, reason: str) -> str:
    return (
        f"cannot get {weights} weights for {architecture} ({reason}); three ways: --weights FILE (a local "
        ".safetensors or .pth), --weights s3://BUCKET/FILE, or --weights none to train from scratch"
    )
