"""Make the model's view of a queue: heatmaps, training images that look alike, and the order by looks."""

from __future__ import annotations

import pyarrow as pa
from joblib import cpu_count

from jobs.common.console import console, show
from jobs.common.local_executor import LocalExecutor
from jobs.review.features import compute_queue_features
from jobs.review.neighbors import find_neighbors
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.datasets import manifest
from scalp_core.inference.predictor import resolve_device
from scalp_core.labels.log import KIND
from scalp_core.labels.queue import Queue
from scalp_core.review.features import FeatureFiles
from scalp_core.review.model_view import ModelView, graded_by, open_bundle_of_run, versions_of
from scalp_core.review.neighbors import NeighborFiles
from scalp_core.review.referrals import Referrals, read_referrals
from scalp_core.storage import outputs


def make_view(bundle: Bundle, data: str, queue: Queue, labels: str) -> ModelView:
    """Make the view of a model, and find the images in `data` that look like the images of `queue`.

    Raises:
        UserError: As `ModelView` and `find_neighbors`.
    """
    view = ModelView(bundle, _find(bundle, data, queue, labels))
    if view.why_no_heatmaps:
        console.print(f"the page offers no heatmaps: {view.why_no_heatmaps}")
    return view


def compute_neighbors(graded: str, labels: str, bundle: str, data: str) -> None:
    """Find and store the training images that look like the referred images, for reviews on an endpoint.

    Args:
        graded: Output directory of `scalp grade`, or store of an endpoint, local or `s3://`.
        labels: Directory of the label log of the review; created if it is missing.
        bundle: Bundle that graded the images.
        data: Directory that `scalp prepare` wrote.

    Raises:
        UserError: A directory is not what it should be, another bundle graded the images, or a training image
            cannot be read any more.
    """
    graded, labels, data = map(storage.absolute, (graded, labels, data))
    queue = (referrals := read_referrals(graded, labels, "referred", [data])).queue
    loaded = open_bundle_of_run(bundle, referrals)
    manifest.read_spec(data)
    outputs.claim_output(labels, KIND)
    files = _find(loaded, data, queue, labels)
    found = sum(image_id in files for image_id in queue.rows["image_id"].to_pylist())
    show("neighbors", {"referred images": len(queue), "with similar images": found, "labels": labels})


def order_by_looks(bundle: Bundle, referrals: Referrals, labels: str) -> Referrals:
    """Order the images by expected gain; compute and store missing features of the images that are compared.

    Raises:
        UserError: Storage failed.
    """
    versions = versions_of(bundle)
    files = FeatureFiles(bundle.spec, labels)
    compute_queue_features(bundle, referrals.candidates(versions), files, _executor())
    ordered = referrals.rank(files, versions)
    if others := len(referrals.queue) - len(ordered.ranks or ()):
        console.print(f"{others:,} of {len(referrals.queue):,} images follow, the least certain first")
    return ordered


def select_graded(bundle: Bundle, queue: Queue) -> pa.Table:
    """Select the result rows of the images that a bundle graded; print how many other models graded."""
    rows = graded_by(bundle, queue.rows)
    if others := len(queue) - rows.num_rows:
        console.print(
            f"other models than {bundle.spec.model_version} graded {others:,} of {len(queue):,} images: "
            "these have no heatmaps and no similar images"
        )
    return rows


def _find(bundle: Bundle, data: str, queue: Queue, labels: str) -> NeighborFiles:
    trained = bundle.spec.training
    spec = manifest.read_spec(data)
    if trained.data_sha256 not in (spec.sha256, *spec.extends):
        console.print(f"{bundle.spec.model_version} was not trained on {data}, which has the similar images")
    files, features = NeighborFiles(bundle.spec, data, labels), FeatureFiles(bundle.spec, labels)
    find_neighbors(bundle, data, select_graded(bundle, queue), files, features, _executor())
    return files


def _executor() -> LocalExecutor:
    return LocalExecutor(cpu_count(), int(resolve_device("auto") == "cuda"))
