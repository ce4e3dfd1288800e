"""The one predictor: evaluation, bulk grading and the endpoint all answer through it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from scalp_core.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.grading import Grading, gradings
from scalp_core.model import build_model, normalise

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]


def resolve_device(device: Device) -> torch.device:
    """`auto` takes a GPU when there is one.

    Raises:
        UserError: cuda was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: this machine has no usable NVIDIA GPU; use --device cpu or auto")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The arithmetic of the forward pass; `auto` takes bf16 where the hardware has it."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Predictor:
    """Grades decoded photographs with a bundle.

    A row's result does not depend on the rest of its batch beyond the last bits, so online and bulk answers
    are equal.

    Args:
        bundle: the loaded bundle.
        device: where the model runs.
        precision: of the forward pass.
        threads: CPU threads of the forward pass; None leaves PyTorch's own choice. Ray sets it to an
            actor's `num_cpus`, and the setting is per thread, so it is made on the thread that computes.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
    ) -> None:
        self.spec = bundle.spec
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        self._threads = threads
        model = build_model(bundle.spec.architecture)
        model.load_state_dict(bundle.state)
        self._model = model.eval().to(self.device).to(memory_format=torch.channels_last)

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def warm_up(self, batch_size: int) -> None:
        """Runs one empty batch, so that the first photograph does not pay for the first call."""
        size = self.spec.preprocess.size
        self.logits(np.zeros((batch_size, size, size, 3), np.uint8))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Raw scores.

        Args:
            images: uint8 (N, size, size, 3) from `preprocess.decode`.

        Returns:
            float32 (N, 4).
        """
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), autocast:
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            return self._model(normalise(batch, self.spec.preprocess)).float().cpu().numpy()

    def grade(self, images: np.ndarray) -> list[Grading]:
        """Grades uint8 (N, size, size, 3); one answer a row, in order."""
        if not len(images):
            return []
        return gradings(self.logits(images), self.spec)
