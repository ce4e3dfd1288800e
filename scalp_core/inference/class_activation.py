"""Grad-CAM without gradients, by OpenVINO: for networks that end in an average pool and one linear layer.

There the gradient of a score with respect to the last feature map is the row of weights of its unit, over the
number of cells: Grad-CAM is CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalp_core.bundles.bundle import Bundle, Graph
from scalp_core.bundles.contract import Head
from scalp_core.grades import NUM_GRADES
from scalp_core.inference.heatmaps import Explainer
from scalp_core.inference.openvino_runtime import openvino  # without its telemetry

# Layers between the pool and the linear layer that only change shapes.
_RESHAPES = ("Reshape", "Squeeze", "Convert")


@dataclass(frozen=True)
class LinearHead:
    """A graph and the weights of its last layer.

    Args:
        model: The graph, with the last feature map (N, channels, rows, columns) as its second output.
        weights: float32 (units, channels).
    """

    model: openvino.Model
    weights: np.ndarray


def find_head(graph: Graph, head: Head) -> LinearHead | None:
    """Find the average pool and the linear layer at the end of a graph; None if it ends in another way."""
    model = openvino.Core().read_model(graph.xml, graph.weights)
    linear = _linear_layer(model, head)
    if linear is None:
        return None
    weights, pool = linear.input_value(1).get_node(), linear.input_value(0).get_node()
    while pool.get_type_name() in _RESHAPES:
        pool = pool.input_value(0).get_node()
    if weights.get_type_name() != "Constant" or pool.get_type_name() != "ReduceMean":
        return None
    feature_map, axes = pool.input_value(0), pool.input_value(1).get_node()
    if feature_map.get_partial_shape().rank != 4 or sorted(axes.data.flatten() % 4) != [2, 3]:
        return None
    model.add_outputs([feature_map])
    return LinearHead(model, weights.data.astype(np.float32))


def _linear_layer(model: openvino.Model, head: Head) -> Any:
    """The layer that computes the logits, or before `CornToLogits` the conditional logits."""
    if head == "corn":  # allows one layer alone
        layers = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
        last = layers[-1] if layers else None
    else:
        last = model.get_results()[0].input_value(0).get_node()
        if last.get_type_name() == "Add":  # the bias
            last = last.input_value(0).get_node()
    is_linear = last is not None and last.get_type_name() == "MatMul" and last.get_attributes()["transpose_b"]
    return last if is_linear else None


class GraphExplainer(Explainer):
    """Explain by the float graph of a bundle, on the CPU.

    Args:
        bundle: Loaded bundle.
        head: Head of its graph, from `find_head`.
    """

    def __init__(self, bundle: Bundle, head: LinearHead) -> None:
        super().__init__(bundle)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self._request = openvino.Core().compile_model(head.model, "CPU", settings).create_infer_request()
        self._weights = head.weights
        size = self.spec.preprocess.size
        _, blank = self._infer(np.zeros((size, size, 3), np.uint8))
        self.cells = blank.shape[1], blank.shape[2]
        self._check_cells()

    def features(self, image: np.ndarray) -> np.ndarray:
        """Compute the input of the last layer, float32 (channels,), of an image uint8 (size, size, 3)."""
        with self._lock:
            means: np.ndarray = self._infer(image)[1].mean(axis=(1, 2))
        return means

    def _infer(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the logits of `grade` (4,) and the feature map (channels, rows, columns)."""
        answer = self._request.infer([image[None]])
        return answer[0][0][:NUM_GRADES], answer[1][0]

    def _maps(self, images: np.ndarray, grades: Sequence[int] | None) -> np.ndarray:
        maps = []
        for index, image in enumerate(images):  # one at a time: equal pixels, equal heatmap
            logits, feature_map = self._infer(image)
            grade = int(logits.argmax()) if grades is None else grades[index]
            slope = _corn_slope(logits, grade) if self.spec.head == "corn" else np.eye(len(logits))[grade]
            channels = (slope @ self._weights[: len(slope)]).astype(np.float32)
            maps.append(np.maximum(np.tensordot(channels, feature_map, 1), 0))
        return np.stack(maps)


def _corn_slope(logits: np.ndarray, grade: int) -> np.ndarray:
    """Gradient of the log-probability of a grade with respect to the conditional logits of `CornToLogits`."""
    probabilities = np.exp(logits.astype(np.float64))
    at_least = probabilities[::-1].cumsum()[::-1]
    conditional = at_least[1:] / np.maximum(at_least[:-1], np.finfo(float).tiny)  # P(grade > k | grade >= k)
    units = np.arange(len(conditional))
    return np.where(units < grade, 1 - conditional, np.where(units == grade, -conditional, 0))
