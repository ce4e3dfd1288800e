"""The model's view of an image, for a reader who asks: its heatmap, and training images that look alike."""

from __future__ import annotations

import pyarrow.compute as pc
from joblib import cpu_count

from jobs.common.console import console
from jobs.common.local_executor import LocalExecutor
from jobs.review.neighbors import Neighbor, find_neighbors
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Resize, decode
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.overlay import transparent_png
from scalp_core.inference.predictor import resolve_device
from scalp_core.labels.queue import Queue


class ModelView:
    """Heatmaps and similar training images; threads may share it.

    Args:
        bundle: Bundle that graded the images.
        neighbors: Similar training images by `image_id`; None if they are not offered.

    Raises:
        UserError: Neither is possible: the architecture has no feature map for heatmaps.
    """

    def __init__(self, bundle: Bundle, neighbors: dict[str, list[Neighbor]] | None = None) -> None:
        self._spec = bundle.spec.preprocess
        self._neighbors = neighbors
        self._explainer = None
        try:
            self._explainer = make_explainer(bundle, "cpu")  # one image at a time
        except UserError as error:
            if neighbors is None:
                raise
            console.print(f"the page offers no heatmaps: {error}")

    @property
    def resize(self) -> Resize | None:
        """How the model's square is placed on an image, for its heatmap; None without heatmaps."""
        return self._spec.resize if self._explainer else None

    @property
    def has_neighbors(self) -> bool:
        """Whether similar training images are offered."""
        return self._neighbors is not None

    def heatmap(self, location: Location, grade: int) -> bytes | None:
        """Compute the heatmap of a grade as a transparent PNG of the model's square; None without heatmaps.

        Raises:
            ImageError: The image cannot be read or decoded, or has changed since it was graded.
        """
        if self._explainer is None:
            return None
        (data,) = read_images([location], MAX_BYTES)
        if isinstance(data, ImageError):
            raise data
        return transparent_png(self._explainer.heatmap(decode(data, self._spec).pixels, grade))

    def neighbors(self, image_id: str) -> list[Neighbor]:
        """Return the training images that look most like an image, the most alike first."""
        return (self._neighbors or {}).get(image_id, [])


def open_bundle_of_run(bundle: str, queue: Queue) -> Bundle:
    """Load the bundle that graded the images of a queue.

    Raises:
        UserError: Another bundle graded them.
    """
    loaded = load_bundle(bundle)
    spec = loaded.spec
    graded_by = pc.unique(queue.rows["model_version"]).to_pylist()
    own = {spec.version_in("fp32"), spec.version_in("int8")}
    if other := [version for version in graded_by if version not in own]:
        raise UserError(
            f"--bundle {bundle} is {spec.model_version}, but {other[0]} graded the images; give the bundle "
            "of the run"
        )
    return loaded


def make_view(bundle: Bundle, data: str | None, queue: Queue, labels: str) -> ModelView:
    """Make the view of a model; with `data`, find the neighbors of the images of `queue` first.

    Raises:
        UserError: As `ModelView` and `find_neighbors`.
    """
    if data is None:
        return ModelView(bundle)
    trained = bundle.spec.training
    spec = manifest.read_spec(data)
    if trained.data_sha256 not in (spec.sha256, *spec.extends):
        console.print(f"{bundle.spec.model_version} was not trained on {data}, which has the similar images")
    executor = LocalExecutor(cpu_count(), int(resolve_device("auto") == "cuda"))
    return ModelView(bundle, find_neighbors(bundle, data, queue, labels, executor))
