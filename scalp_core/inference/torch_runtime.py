"""The PyTorch runtime: for GPUs with CUDA graphs, and for CPUs with `--runtime torch`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from scalp_core.bundles.bundle import Bundle
from scalp_core.grades import NUM_GRADES
from scalp_core.models.architecture import first_line, head_names, load_model, normalize, to_channels_last

_logger = logging.getLogger(__name__)

# Batch sizes. Batches are padded to one of them, so that four CUDA graphs are enough. Larger batches are cut,
# and the next chunk is copied during the computation of the current one.
_BUCKETS = (1, 8, 32, 128)
# Fraction of the free GPU memory for the largest bucket: several models may share a GPU.
_MEMORY_FRACTION = 0.5


class TorchRuntime:
    """Run the weights, channels last.

    Args:
        compiled: Whether to compile with Inductor and freezing: half a minute per shape, for long GPU runs.
        folded: Whether to fold batch normalization into the convolutions, where the architecture allows it.
        threads: CPU threads; None: PyTorch's default. PyTorch stores the setting per thread, so it is set on
            the thread that computes.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Literal["cpu", "cuda"],
        precision: Literal["bf16", "fp32"],
        *,
        compiled: bool = False,
        folded: bool = True,
        threads: int | None = None,
    ) -> None:
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._device = torch.device(device)
        self._spec = bundle.spec.preprocess
        self._threads = threads
        model = to_channels_last(_convert(load_model(bundle), self._dtype, folded).to(self._device))
        self._model = torch.compile(model, dynamic=False, options={"freezing": True}) if compiled else model
        self._lock = threading.Lock()
        self._graphs: _CudaGraphs | None = None
        if device == "cuda":
            torch.backends.cudnn.benchmark = True  # few shapes, each used for long
            torch.backends.cudnn.allow_tf32 = precision == "bf16"  # fp32 must be true fp32
            outputs = NUM_GRADES * bundle.spec.symptoms
            self._graphs = _CudaGraphs(self._forward, self._spec.size, outputs)

    def warm_up(self, batch_size: int, size: int, *, smaller: bool = True) -> None:
        """Compile or capture the shape to which batches of `batch_size` are padded.

        Args:
            smaller: Whether to do so for each smaller bucket; else smaller batches are padded to this one.
        """
        # Batches above the largest bucket that fits are cut into chunks of it.
        counts = [bucket for bucket in _BUCKETS if bucket < batch_size] if self._graphs and smaller else []
        for count in (*counts, batch_size):
            self.logits(np.zeros((min(count, _BUCKETS[-1]), size, size, 3), np.uint8))

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits, float32 (N, 4 S) of S symptoms, of images uint8 (N, size, size, 3)."""
        with self._lock:
            if self._threads is not None and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            if self._graphs:
                return self._graphs.run(images)
            chunks = _chunks(np.ascontiguousarray(images), _BUCKETS[-1])
            return np.concatenate([self._forward(torch.from_numpy(chunk)).numpy() for chunk in chunks])

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._model(normalize(images, self._spec).to(self._dtype)).float()


@dataclass
class _Slot:
    """Buffers of one chunk on its way to the GPU."""

    pinned: torch.Tensor
    staged: torch.Tensor
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    taken: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class _CudaGraphs:
    """One captured CUDA graph per bucket, fed through two pinned slots that overlap copy and computation.

    The free memory of the GPU limits the largest bucket.
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], size: int, outputs: int) -> None:
        self._forward = forward
        self._outputs = outputs
        self._shape = (size, size, 3)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._largest_bucket = largest_bucket(self._bytes_per_image(), torch.cuda.mem_get_info()[0])
        largest = (self._largest_bucket, *self._shape)
        self._slots = [
            _Slot(
                torch.empty(largest, dtype=torch.uint8, pin_memory=True),
                torch.empty(largest, dtype=torch.uint8, device="cuda"),
            )
            for _ in range(2)
        ]
        self._copies = torch.cuda.Stream()

    def run(self, images: np.ndarray) -> np.ndarray:
        """Compute logits, float32 (N, 4 S), of images uint8 (N, size, size, 3)."""
        logits = torch.empty((len(images), self._outputs), dtype=torch.float32, pin_memory=True)
        start = 0
        for number, chunk in enumerate(_chunks(images, self._largest_bucket)):
            slot, count = self._slots[number % 2], len(chunk)
            graph, placed, result = self._graph(choose_bucket(count, self._graphs))
            slot.copied.synchronize()  # the pinned memory is free again
            slot.pinned.numpy()[:count] = chunk
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(slot.taken)
                slot.staged[:count].copy_(slot.pinned[:count], non_blocking=True)
                slot.copied.record()
            torch.cuda.current_stream().wait_event(slot.copied)
            placed[:count].copy_(slot.staged[:count])
            slot.taken.record()
            graph.replay()
            logits[start : start + count].copy_(result[:count], non_blocking=True)
            start += count
        torch.cuda.current_stream().synchronize()
        return logits.numpy().copy()

    @torch.inference_mode()
    def _bytes_per_image(self) -> float:
        """Measure the GPU memory per image of a forward pass, in addition to the weights."""
        images = torch.zeros((_BUCKETS[1], *self._shape), dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._forward(images)
        return (torch.cuda.max_memory_allocated() - before) / len(images)

    def _graph(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        if bucket not in self._graphs:
            placed = torch.zeros((bucket, *self._shape), dtype=torch.uint8, device="cuda")
            warm_up_stream = torch.cuda.Stream()
            warm_up_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up_stream):  # libraries choose their kernels before the capture
                for _ in range(3):
                    self._forward(placed)
            torch.cuda.current_stream().wait_stream(warm_up_stream)
            graph = torch.cuda.CUDAGraph()
            # Another thread may replay the graphs of the previous model.
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


def _convert(model: nn.Module, dtype: torch.dtype, folded: bool) -> nn.Module:
    """Fold batch normalization, and convert all but the heads: bf16 logits of 8 bits would tie."""
    heads = head_names(model)
    # Before folding, which inlines timm's layers, possibly including the heads.
    for name in heads:
        model.set_submodule(name, _InFloat32(model.get_submodule(name)))
    prefixes = tuple(f"{name}." for name in heads)
    exact = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefixes)}
    try:
        model = fuse(model) if folded else model
    except Exception as error:  # for example control flow that depends on the input
        _logger.warning("batch normalization is not folded, which is slower: %s", first_line(error))
    model.to(dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in exact:
            tensor.data = exact[name]
    return model


def largest_bucket(bytes_per_image: float, free: int) -> int:
    """Return the largest bucket whose forward pass fits into its fraction of the free bytes; at least 1."""
    limit = _MEMORY_FRACTION * free
    return max(bucket for bucket in _BUCKETS if bucket == 1 or bucket * bytes_per_image <= limit)


def _chunks(images: np.ndarray, most: int) -> list[np.ndarray]:
    return [images[start : start + most] for start in range(0, len(images), most)]


def choose_bucket(count: int, captured: Collection[int]) -> int:
    """Return the smallest bucket for `count` images, of the captured ones if one of them is large enough.

    A capture takes seconds, and a pass of the largest bucket milliseconds.
    """
    return min(
        [bucket for bucket in captured if bucket >= count]
        or [bucket for bucket in _BUCKETS if bucket >= count]
    )
