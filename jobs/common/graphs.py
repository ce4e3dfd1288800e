"""Graphs of a bundle for CPUs: converted from its weights, and compared with them on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from jobs.common.images import LoadForTraining, select_locations
from scalp_core.bundles.bundle import Bundle, Graph, graph_files, sha256
from scalp_core.bundles.contract import GraphKind, GraphRecord
from scalp_core.errors import UserError
from scalp_core.evaluation import metrics
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference import openvino_runtime
from scalp_core.inference.openvino_runtime import OpenVinoRuntime

_BATCH = 32
_MAX_DIFFERENCE = 1e-3
_COMPARED = 64

Logits = Callable[[np.ndarray], np.ndarray]


def with_float_graph(bundle: Bundle, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Bundle:
    """Add the graph that CPUs run in bf16 or fp32 to a bundle with its weights.

    Weights and graph are compared on `batches` of images uint8 (N, size, size, 3) and labels.

    Raises:
        RuntimeError: Logits of the graph differ from those of the weights.
    """
    from scalp_core.inference.torch_runtime import TorchRuntime

    graph = openvino_runtime.convert(bundle)
    weights = TorchRuntime(bundle, "cpu", "fp32", folded=False)
    record = make_record(
        graph, *logits_of_both(OpenVinoRuntime(graph, "fp32").logits, weights.logits, batches)
    )
    if not record.max_logit_difference < _MAX_DIFFERENCE:
        raise RuntimeError(
            f"logits of the graph differ by {record.max_logit_difference} from those of the weights"
        )
    return with_graph(bundle, "float", graph, record)


def with_graph(bundle: Bundle, kind: GraphKind, graph: Graph, record: GraphRecord) -> Bundle:
    """Add or replace a graph of a bundle; save it with `save_bundle(uri, bundle.spec, bundle.files)`."""
    spec = bundle.spec.model_copy(update={"graphs": {**bundle.spec.graphs, kind: record}})
    return Bundle(spec, files=bundle.files | graph_files(kind, graph))


def logits_of_both(
    candidate: Logits, reference: Logits, batches: Iterator[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run two models on the same batches of images uint8 (N, size, size, 3) and labels.

    Returns:
        Labels int (N,), logits of the candidate float (N, 4 S), logits of the reference float (N, 4 S).

    Raises:
        UserError: A logit is not finite.
    """
    pairs, labels = [], []
    for images, truth in batches:
        pairs.append((candidate(images), reference(images)))
        labels.append(truth)
    own, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        raise UserError(
            "the model's scores of validation images are not finite numbers; train again with a smaller "
            "learning_rate"
        )
    return np.concatenate(labels), own, other


def make_record(
    graph: Graph,
    labels: np.ndarray,
    own: np.ndarray,
    other: np.ndarray,
    comparison: Comparison | None = None,
) -> GraphRecord:
    """Record of a graph for the bundle, from the results of `logits_of_both`."""
    grades = [logits[:, :NUM_GRADES].argmax(axis=1) for logits in (own, other)]
    counts = [metrics.confusion(labels, of_model) for of_model in grades]
    qwk = [metrics.quadratic_weighted_kappa(matrix) for matrix in counts]
    return GraphRecord(
        xml_sha256=sha256(graph.xml),
        weights_sha256=sha256(graph.weights),
        photographs=len(labels),
        max_logit_difference=float(np.abs(own - other).max()),
        grade_agreement=float(np.mean(grades[0] == grades[1])),
        qwk_drop=qwk[1] - qwk[0],
        openvino=openvino_runtime.version(),
        comparison=comparison,
    )


def few_batches(val: pa.Table, spec: Preprocess) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of a few validation images: a wrong conversion is far off for any image."""
    return labeled_batches(val.slice(0, _COMPARED), spec)


def labeled_batches(rows: pa.Table, spec: Preprocess) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of decoded images and labels of manifest rows, in their order.

    Raises:
        UserError: An image cannot be read any more.
    """
    load = LoadForTraining(spec)
    for start in range(0, rows.num_rows, _BATCH):
        chunk = select_locations(rows.slice(start, _BATCH), "label")
        batch = load({name: np.array(chunk[name].to_pylist(), dtype=object) for name in chunk.column_names})
        yield batch["image"], batch["label"].astype(int)
