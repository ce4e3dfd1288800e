"""The model by PyTorch: on GPUs, and on CPUs when it is asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from scalp_core.bundles.bundle import Head
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.architecture import build_model, first_line, head_names, normalize, to_channels_last

_logger = logging.getLogger(__name__)

# Batches are padded to one of these, so that four CUDA graphs serve all sizes. Larger batches are cut: while
# one piece is computed the next one is copied.
_BUCKETS = (1, 8, 32, 128)
# Of the free memory of a GPU, for the largest of these: several models may share it.
_MEMORY_SHARE = 0.5


class TorchRuntime:
    """Runs the weights, channels last, batch normalization folded into the convolutions.

    Args:
        architecture: timm name.
        state: weights by name.
        spec: preprocessing.
        device: `cpu` or `cuda`.
        precision: of the forward pass.
        compiled: by Inductor, frozen. Takes half a minute a shape; for long runs.
        threads: CPU threads; None leaves PyTorch's own choice. The setting is per thread, and Ray makes its
            own, so it is made on the thread that computes.
        head: as in the bundle.
    """

    def __init__(
        self,
        architecture: str,
        state: dict[str, torch.Tensor],
        spec: Preprocess,
        device: Literal["cpu", "cuda"],
        precision: Literal["bf16", "fp32"],
        *,
        compiled: bool = False,
        threads: int | None = None,
        head: Head = "softmax",
    ) -> None:
        model = build_model(architecture, head, spec.size).eval()
        model.load_state_dict(state)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._device = torch.device(device)
        self._spec = spec
        self._threads = threads
        folded = to_channels_last(_folded(model, self._dtype).to(self._device))
        self._model = torch.compile(folded, dynamic=False, options={"freezing": True}) if compiled else folded
        self._pads = compiled or device == "cuda"
        self._turn = threading.Lock()
        self._graphs: _CudaGraphs | None = None
        if device == "cuda":
            torch.backends.cudnn.benchmark = True  # few shapes, each for long
            torch.backends.cudnn.allow_tf32 = precision == "bf16"  # fp32 means fp32
            self._graphs = _CudaGraphs(self._forward, spec.size)

    def warm_up(self, batch_size: int, size: int) -> None:
        """Compiles, and captures, each shape that batches up to `batch_size` are padded to."""
        for bucket in _BUCKETS if self._pads else (batch_size,):
            # What is above the largest that fits is cut into such.
            self.logits(np.zeros((bucket, size, size, 3), np.uint8))
            if bucket >= batch_size:
                break

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, size, size, 3) to float32 (N, 4)."""
        with self._turn:
            if self._threads is not None and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            if self._graphs:
                return self._graphs.run(images)
            return np.concatenate([self._on_cpu(piece) for piece in _pieces(images, _BUCKETS[-1])])

    def _on_cpu(self, images: np.ndarray) -> np.ndarray:
        padded = _padded(images, _bucket(len(images))) if self._pads else np.ascontiguousarray(images)
        return self._forward(torch.from_numpy(padded)).numpy()[: len(images)]

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._model(normalize(images, self._spec).to(self._dtype)).float()


@dataclass
class _Slot:
    """Where one piece waits on its way to the GPU."""

    pinned: torch.Tensor
    staged: torch.Tensor
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    taken: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class _CudaGraphs:
    """A captured graph a bucket, fed through two pinned slots: one is copied while the other is computed.

    The largest bucket is the largest that the GPU's memory takes.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], size: int) -> None:
        self._forward = forward
        self._shape = (size, size, 3)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._most = largest_bucket(self._bytes_a_photograph(), torch.cuda.mem_get_info()[0])
        largest = (self._most, *self._shape)
        self._slots = [
            _Slot(
                torch.empty(largest, dtype=torch.uint8, pin_memory=True),
                torch.empty(largest, dtype=torch.uint8, device="cuda"),
            )
            for _ in range(2)
        ]
        self._copies = torch.cuda.Stream()

    def run(self, images: np.ndarray) -> np.ndarray:
        answers = torch.empty((len(images), NUM_GRADES), dtype=torch.float32, pin_memory=True)
        start = 0
        for number, piece in enumerate(_pieces(images, self._most)):
            slot, count = self._slots[number % 2], len(piece)
            graph, placed, result = self._graph(_bucket(count))
            slot.copied.synchronize()  # the pinned memory is free again
            slot.pinned.numpy()[:count] = piece
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(slot.taken)
                slot.staged[:count].copy_(slot.pinned[:count], non_blocking=True)
                slot.copied.record()
            torch.cuda.current_stream().wait_event(slot.copied)
            placed[:count].copy_(slot.staged[:count])
            slot.taken.record()
            graph.replay()
            answers[start : start + count].copy_(result[:count], non_blocking=True)
            start += count
        torch.cuda.current_stream().synchronize()
        return answers.numpy().copy()

    @torch.inference_mode()
    def _bytes_a_photograph(self) -> float:
        """Of memory, that a forward pass takes beside the weights."""
        images = torch.zeros((_BUCKETS[1], *self._shape), dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._forward(images)
        return (torch.cuda.max_memory_allocated() - before) / len(images)

    def _graph(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        if bucket not in self._graphs:
            placed = torch.zeros((bucket, *self._shape), dtype=torch.uint8, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose their kernels before the capture
                for _ in range(3):
                    self._forward(placed)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may be replaying the graphs of the model that this one will replace.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self._forward(placed)
            self._graphs[bucket] = graph, placed, result
        return self._graphs[bucket]


class _InFloat32(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layer(values.float())


def _folded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fold batch normalization, and convert all but the heads: logits of 8 bits would tie."""
    heads = head_names(model)
    # Before folding: it inlines timm's own layers, and the heads may be such.
    for name in heads:
        model.set_submodule(name, _InFloat32(model.get_submodule(name)))
    exact = {name: value.clone() for name, value in model.state_dict().items() if _is_in(name, heads)}
    try:
        model = fuse(model)
    except Exception as error:  # such as a model that decides by its input; right as it is, only slower
        _logger.warning("batch normalization is not folded, which is slower: %s", first_line(error))
    model.to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in exact:
            tensor.data = exact[name]
    return model


def _is_in(name: str, modules: list[str]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules))


def largest_bucket(bytes_a_photograph: float, free: int) -> int:
    """The largest batch whose forward pass takes no more than its share of the free bytes; 1 at least."""
    return max(each for each in _BUCKETS if each == 1 or each * bytes_a_photograph <= _MEMORY_SHARE * free)


def _pieces(images: np.ndarray, most: int) -> list[np.ndarray]:
    return [images[start : start + most] for start in range(0, len(images), most)]


def _bucket(count: int) -> int:
    return next(bucket for bucket in _BUCKETS if bucket >= count)


def _padded(images: np.ndarray, count: int) -> np.ndarray:
    padded = np.zeros((count, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return padded
