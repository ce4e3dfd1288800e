"""The OpenVINO runtime for CPUs: conversion of weights to a graph, int8 quantization, forward passes.

A graph is two files without code. It runs without PyTorch, whose import takes seconds and half a gigabyte per
process. docs/architecture.md compares it with PyTorch, Inductor and ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from joblib import cpu_count

from scalp_core.bundles.bundle import Bundle, Graph
from scalp_core.bundles.contract import GraphKind

if TYPE_CHECKING:
    import torch

# OpenVINO and NNCF send usage data to Intel, unless the import of this module fails.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402

CpuPrecision = Literal["bf16", "fp32", "int8"]

# Sizes into which a batch is cut. Larger ones exceed the caches (docs/architecture.md). `warm_up` compiles
# all four shapes, and no size needs padding.
_BATCHES = (8, 4, 2, 1)


def _visible_cores() -> int:
    """Count the cores on which this process may run, regardless of a container's CPU quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpu_count()


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions, according to OpenVINO."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    return openvino.get_version()


def convert(bundle: Bundle) -> Graph:
    """Convert the weights of a bundle and the normalization of images to a graph; weights stay fp32."""
    import torch
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from scalp_core.models.architecture import load_model, normalize

    spec = bundle.spec.preprocess

    class WithNormalize(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_model(bundle)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(normalize(images, spec))

    example = torch.zeros(2, spec.size, spec.size, 3, dtype=torch.uint8)
    normalize(example, spec)  # caches its constants, so that the trace has no operations for them
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing warns of constants, here those of the normalization
        # Its check would run the model twice more; `with_float_graph` compares the graph with the weights.
        traced = TorchScriptPythonDecoder(
            WithNormalize().eval(), example_input=example, trace_kwargs={"check_trace": False}
        )
        model = openvino.convert_model(traced, example_input=example, input=[-1, *example.shape[1:]])
    return _serialize(model)


def load_graph(bundle: Bundle, kind: GraphKind) -> Graph:
    """Load the graph of a bundle; a bundle older than graphs has its weights converted, which takes seconds.

    Raises:
        UserError: The bundle has no int8 graph that passed its comparison.
    """
    if kind == "float" and not bundle.spec.offers("float"):
        return convert(bundle)
    return bundle.graph(kind)


def quantize(graph: Graph, images: np.ndarray, *, careful: bool = False) -> Graph:
    """Quantize a graph to int8, with ranges from images (post-training quantization by NNCF).

    Args:
        graph: Float graph from `convert`.
        images: uint8 (N, size, size, 3), a few hundred of the training split.
        careful: Whether to correct biases layer by layer; twice as slow, sometimes more accurate.
    """
    # On import it warns of a missing CUDA compiler.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # it logs a line per step
    dataset = nncf.Dataset([images[index : index + 1] for index in range(len(images))])
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF draws progress bars on stdout
        model = nncf.quantize(
            _read(graph), dataset, subset_size=len(images), fast_bias_correction=not careful
        )
    return _serialize(model)


class OpenVinoRuntime:
    """Run a graph on the CPU. Thread-safe: `streams` threads run in parallel, others wait.

    Args:
        graph: Float graph, or the int8 one for `precision` int8; or the model that was read from it.
        precision: bf16 and fp32 run the float graph, int8 the quantized one.
        threads: CPU threads of all streams together; None: the cores of this process or container.
        streams: Forward passes that run in parallel and divide the threads.
    """

    def __init__(
        self,
        graph: Graph | openvino.Model,
        precision: CpuPrecision,
        threads: int | None = None,
        streams: int = 1,
    ) -> None:
        self._precision, self._threads = precision, threads
        self._model = _read(graph) if isinstance(graph, Graph) else graph
        threads = threads or cpu_count()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            # Pinning helps a model that has all cores. Two models, or two containers with CPU quotas, would
            # be pinned to the same cores.
            "ENABLE_CPU_PINNING": streams == 1 and threads >= _visible_cores(),
        }
        compiled = openvino.Core().compile_model(self._model, "CPU", settings)
        self._outputs = compiled.output(0).partial_shape[1].get_length()
        self.requests = [compiled.create_infer_request() for _ in range(streams)]
        self._free: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for request in self.requests:
            self._free.put(request)

    def in_streams(self, streams: int) -> OpenVinoRuntime:
        """Compile the same model for parallel passes; both share the weights of the graph."""
        return OpenVinoRuntime(self._model, self._precision, self._threads, streams)

    def warm_up(self, batch_size: int, size: int, *, smaller: bool = True) -> None:  # noqa: ARG002
        """Run each shape into which batches up to `batch_size` are cut, once per stream."""
        for batch in _BATCHES:
            for _ in self.requests if batch <= batch_size else ():
                self.logits(np.zeros((batch, size, size, 3), np.uint8))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits, float32 (N, 4 S), of images uint8 (N, size, size, 3), independent of the batch."""
        images = np.ascontiguousarray(images)
        result = np.empty((len(images), self._outputs), np.float32)
        request = self._free.get()
        try:
            for start, stop in _cuts(len(images)):
                answer = request.infer([images[start:stop]], share_inputs=True, share_outputs=True)
                result[start:stop] = answer[0]
        finally:
            self._free.put(request)
        return result


def _cuts(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    for batch in _BATCHES:
        while count - start >= batch:
            yield start, start + batch
            start += batch


def _read(graph: Graph) -> openvino.Model:
    return openvino.Core().read_model(graph.xml, graph.weights)


def _serialize(model: openvino.Model) -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        openvino.save_model(model, path, compress_to_fp16=False)
        return Graph(path.read_bytes(), path.with_suffix(".bin").read_bytes())
