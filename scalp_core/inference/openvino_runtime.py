"""The model on a CPU, by OpenVINO: from weights to a graph, to int8, and the forward pass.

Measured beside PyTorch, Inductor and ONNX Runtime in docs/architecture.md. A graph is data, two files without
code, and runs without importing PyTorch, which takes seconds and half a gigabyte in each process.
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
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from joblib import cpu_count

from scalp_core.bundles.bundle import Bundle, Graph, GraphKind, Head
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

# OpenVINO and NNCF report their use to their maker, unless the module that does it cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402

CpuPrecision = Literal["bf16", "fp32", "int8"]

# A batch is cut into these: larger ones leave the caches (docs/architecture.md), four shapes are compiled,
# all by `warm_up`, and nothing is computed that nobody asked for.
_BATCHES = (8, 4, 2, 1)


def _visible_cores() -> int:
    """Cores on which this process may be scheduled, whatever its container's limit of CPU time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpu_count()


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself, as the runtime that would use it says."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    """Of OpenVINO."""
    return openvino.get_version()


def convert(
    architecture: str, state: dict[str, torch.Tensor], spec: Preprocess, head: Head = "softmax"
) -> Graph:
    """The trained model with its normalization as a graph; weights stay fp32.

    Args:
        architecture: timm name.
        state: weights by name.
        spec: the preprocessing whose `normalize` goes into the graph.
        head: as in the bundle.
    """
    import torch

    from scalp_core.models.architecture import build_model, normalize

    class WithNormalize(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(architecture, head, spec.size)
            self.model.load_state_dict(state)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(normalize(images, spec))

    example = torch.zeros(2, spec.size, spec.size, 3, dtype=torch.uint8)
    normalize(example, spec)  # keeps its constants, so that they are no operations of the trace
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing warns of constants, which the normalization's numbers are
        model = openvino.convert_model(
            WithNormalize().eval(), example_input=example, input=[-1, *example.shape[1:]]
        )
    return _serialize(model)


def load_graph(bundle: Bundle, kind: GraphKind) -> Graph:
    """Load the graph of a bundle; one from before graphs has its weights converted, which takes seconds.

    Raises:
        UserError: int8 was never made for this bundle, or has no comparison that it passed.
    """
    spec = bundle.spec
    if kind == "float" and not spec.offers("float"):
        return convert(spec.architecture, bundle.state, spec.preprocess, spec.head)
    return bundle.graph(kind)


def quantize(graph: Graph, images: np.ndarray, *, careful: bool = False) -> Graph:
    """The graph in int8, with ranges from photographs (post-training quantization by NNCF).

    Args:
        graph: from `convert`.
        images: uint8 (N, size, size, 3), a few hundred of the training part.
        careful: corrects biases layer by layer; twice as slow, sometimes closer.
    """
    # Says on import that there is no CUDA compiler.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf

    dataset = nncf.Dataset([images[index : index + 1] for index in range(len(images))])
    with contextlib.redirect_stdout(io.StringIO()), _quiet_nncf():
        model = nncf.quantize(
            _read(graph), dataset, subset_size=len(images), fast_bias_correction=not careful
        )
    return _serialize(model)


class OpenVinoRuntime:
    """Runs a graph on this machine's CPU. May be shared by threads: as many as there are streams run at once.

    Args:
        graph: float, or int8 with `precision` int8.
        precision: bf16 and fp32 run the float graph, int8 the quantized one.
        threads: of all forward passes together; None takes the cores of this process or container.
        streams: forward passes that run beside each other and divide the threads.
    """

    def __init__(
        self, graph: Graph, precision: CpuPrecision, threads: int | None = None, streams: int = 1
    ) -> None:
        threads = threads or cpu_count()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            # Pinning helps a model that has all cores. Two models, or two containers with limits of CPU time,
            # would be pinned to the same ones.
            "ENABLE_CPU_PINNING": streams == 1 and threads >= _visible_cores(),
        }
        compiled = openvino.Core().compile_model(_read(graph), "CPU", settings)
        self.requests = [compiled.create_infer_request() for _ in range(streams)]
        self._free: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for request in self.requests:
            self._free.put(request)

    def warm_up(self, batch_size: int, size: int) -> None:
        """Runs each shape that batches up to `batch_size` are cut into once, in each stream that is free."""
        for batch in _BATCHES:
            for _ in self.requests if batch <= batch_size else ():
                self.logits(np.zeros((batch, size, size, 3), np.uint8))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, size, size, 3) to float32 (N, 4). A row's result does not depend on its batch."""
        images = np.ascontiguousarray(images)
        result = np.empty((len(images), NUM_GRADES), np.float32)
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


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[None]:
    """NNCF draws bars of its own, straight to the terminal, and logs each step."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
