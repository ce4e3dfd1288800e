"""The model's view of an image, for a reader who asks: its heatmap, and training images that look alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Resize, decode
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.overlay import transparent_png
from scalp_core.labels.queue import Queue
from scalp_core.review.pictures import read_file


@dataclass(frozen=True)
class Neighbor:
    """A training image that looks like an image of the queue."""

    location: Location
    grade: int


class ModelView:
    """Heatmaps and similar training images; threads may share it.

    Args:
        bundle: Bundle that graded the images.
        neighbors: Similar training images by `image_id`; None if they are not offered.

    Raises:
        UserError: Neither is possible: the architecture has no feature map for heatmaps.
    """

    def __init__(self, bundle: Bundle, neighbors: Mapping[str, Sequence[Neighbor]] | None = None) -> None:
        self._spec = bundle.spec.preprocess
        self._neighbors = neighbors
        self._explainer = None
        self.why_no_heatmaps = ""
        """Reason why heatmaps are not offered; empty if they are."""
        try:
            self._explainer = make_explainer(bundle, "cpu")  # one image at a time
        except UserError as error:
            if neighbors is None:
                raise
            self.why_no_heatmaps = str(error)

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
        pixels = decode(read_file(location), self._spec).pixels
        return transparent_png(self._explainer.heatmap(pixels, grade))

    def neighbors(self, image_id: str) -> list[Neighbor]:
        """Return the training images that look most like an image, the most alike first."""
        return list((self._neighbors or {}).get(image_id, ()))


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
            f"the bundle {bundle} is {spec.model_version}, but {other[0]} graded the images; give the bundle "
            "of the run"
        )
    return loaded
