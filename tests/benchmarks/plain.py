"""The plain way: Pillow at full resolution, and PyTorch as a tutorial runs it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from scalp_core.bundles.bundle import Bundle
from scalp_core.inference.predictor import Hardware

Forward = Callable[[np.ndarray], np.ndarray]


def plain_decode(data: bytes, size: int) -> np.ndarray:
    """Decode to uint8 (size, size, 3)."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def plain_forward(
    bundle: Bundle,
    device: Hardware,
    precision: Literal["bf16", "fp32"] = "fp32",
    channels_last: bool = False,
) -> Forward:
    """Forward pass of PyTorch: uint8 (N, size, size, 3) to float32 (N, 4)."""
    import torch

    from scalp_core.models.architecture import load_model, normalize

    layout = torch.channels_last if channels_last else torch.contiguous_format
    model: Any = load_model(bundle).to(device)
    model = model.to(memory_format=layout)
    spec = bundle.spec.preprocess

    @torch.inference_mode()
    def forward(images: np.ndarray) -> np.ndarray:
        batch = normalize(torch.from_numpy(images).to(device), spec).contiguous(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return model(batch).float().cpu().numpy()

    return forward
