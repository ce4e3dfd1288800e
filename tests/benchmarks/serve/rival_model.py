"""Model of the rival servers: the same bundle, by scalp's engine or by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from scalp_core.bundles.loading import load_bundle
from scalp_core.images.preprocess import decode
from scalp_core.inference import calibration
from scalp_core.inference.predictor import Hardware, Predictor, has_bf16
from tests.benchmarks.plain import Forward, plain_forward


class Arguments(BaseModel):
    """Arguments of a rival server."""

    bundle: str = Field(description="local directory of the bundle")
    device: Hardware = Field(description="device of the model")
    cores: int = Field(description="CPU cores for all models of the server together")
    workers: int = Field(1, description="LitServe's inference processes, which share the cores")
    max_batch_size: int = Field(16, description="images per forward pass of LitServe")
    batch_timeout: float = Field(0.005, description="seconds that LitServe waits for a batch to fill")
    engine: bool = Field(False, description="decode and run the model by scalp's engine, not by PyTorch")


@dataclass
class Model:
    """Decode bytes to pixels, and grade pixels."""

    arguments: Arguments

    def __post_init__(self) -> None:
        bundle = load_bundle(self.arguments.bundle)
        self._spec, device = bundle.spec, self.arguments.device
        threads = max(1, self.arguments.cores // self.arguments.workers)
        self._forward: Forward
        if self.arguments.engine:
            predictor = Predictor(bundle, device, threads=threads)
            predictor.warm_up(self.arguments.max_batch_size)
            self._forward = predictor.logits
        else:
            import torch

            torch.set_num_threads(threads)
            precision: Literal["bf16", "fp32"] = "bf16" if has_bf16(device) else "fp32"
            self._forward = plain_forward(bundle, device, precision, channels_last=True)
            for size in range(1, self.arguments.max_batch_size + 1):
                side = self._spec.preprocess.size
                self._forward(np.zeros((size, side, side, 3), np.uint8))

    def decode(self, data: bytes) -> np.ndarray:
        """Decode an image to uint8 (size, size, 3)."""
        if self.arguments.engine:
            return decode(data, self._spec.preprocess).pixels
        return _decode_by_torchvision(data, self._spec.preprocess.size)

    def grade(self, images: np.ndarray) -> list[dict[str, Any]]:
        """Answers for uint8 (N, size, size, 3)."""
        probabilities = calibration.probabilities(self._forward(images), self._spec.temperature)
        return [{"grade": int(row.argmax()), "probabilities": row.tolist()} for row in probabilities]


def _decode_by_torchvision(data: bytes, size: int) -> np.ndarray:
    """Decode at full resolution, as LitServe's examples do."""
    import torch
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2 import functional

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return functional.resize(pixels, [size, size], antialias=True).permute(1, 2, 0).numpy()
