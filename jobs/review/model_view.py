"""Make the model's view of a queue: heatmaps, and training images that look alike."""

from __future__ import annotations

from joblib import cpu_count

from jobs.common.console import console
from jobs.common.local_executor import LocalExecutor
from jobs.review.neighbors import find_neighbors
from scalp_core.bundles.bundle import Bundle
from scalp_core.datasets import manifest
from scalp_core.inference.predictor import resolve_device
from scalp_core.labels.queue import Queue
from scalp_core.review.model_view import ModelView


def make_view(bundle: Bundle, data: str, queue: Queue, labels: str) -> ModelView:
    """Make the view of a model, and find the neighbors in `data` of the images of `queue`.

    Raises:
        UserError: As `ModelView` and `find_neighbors`.
    """
    trained = bundle.spec.training
    spec = manifest.read_spec(data)
    if trained.data_sha256 not in (spec.sha256, *spec.extends):
        console.print(f"{bundle.spec.model_version} was not trained on {data}, which has the similar images")
    executor = LocalExecutor(cpu_count(), int(resolve_device("auto") == "cuda"))
    view = ModelView(bundle, find_neighbors(bundle, data, queue, labels, executor))
    if view.why_no_heatmaps:
        console.print(f"the page offers no heatmaps: {view.why_no_heatmaps}")
    return view
