"""The model's view of an image, for a reader who asks: its heatmap, and training images that look alike."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Resize, decode
from scalp_core.inference.class_activation import GraphExplainer
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.overlay import transparent_png
from scalp_core.review.neighbor_search import find_and_add, read_searchable
from scalp_core.review.neighbors import Neighbor, NeighborFiles
from scalp_core.review.pictures import read_file
from scalp_core.review.referrals import Referrals


class ModelView:
    """Heatmaps and similar training images, of the images that one bundle graded; threads may share it.

    Args:
        bundle: Bundle that graded the images.
        neighbors: Similar training images; None if they are not offered.
        data: Prepared data of `neighbors`, to search for images that have none yet, as those that a store
            gets; None: they are not searched.

    Raises:
        UserError: Neither is possible: the architecture has no feature map for heatmaps.
    """

    def __init__(
        self, bundle: Bundle, neighbors: NeighborFiles | None = None, data: str | None = None
    ) -> None:
        self._spec = bundle.spec.preprocess
        self._versions = versions_of(bundle)
        self._neighbors, self._data = neighbors, data
        self._train: pa.Table | None = None  # rows to search
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

    def refresh(self) -> None:
        """Read the similar training images that other programs have found since.

        Raises:
            UserError: Storage failed.
        """
        if self._neighbors is not None:
            self._neighbors.read_new()
            if self._data and self._train is None and isinstance(self._explainer, GraphExplainer):
                self._train = read_searchable(self._data, self._neighbors)

    def has_heatmap(self, model_version: str) -> bool:
        """Whether heatmaps of the images that this version graded are offered: only the bundle's."""
        return self._explainer is not None and model_version in self._versions

    def has_neighbors(self, image_id: str, model_version: str) -> bool:
        """Whether similar training images of an image that this version graded are offered."""
        if self._neighbors is None:
            return False
        return image_id in self._neighbors or (self._train is not None and model_version in self._versions)

    def heatmap(self, location: Location, grade: int) -> bytes | None:
        """Compute the heatmap of a grade as a transparent PNG of the model's square; None without heatmaps.

        Raises:
            ImageError: The image cannot be read or decoded, or has changed since it was graded.
        """
        if self._explainer is None:
            return None
        pixels = decode(read_file(location), self._spec).pixels
        return transparent_png(self._explainer.heatmap(pixels, grade))

    def neighbors(self, image_id: str, location: Location) -> list[Neighbor]:
        """Return the training images that look most like an image, the most alike first.

        They are searched and stored, if they are not known.

        Raises:
            ImageError: The image cannot be read or decoded, or has changed since it was graded.
            UserError: Storage failed.
        """
        files = self._neighbors
        if files is None:
            return []
        explainer = self._explainer
        if image_id not in files and self._train is not None and isinstance(explainer, GraphExplainer):
            features = explainer.features(decode(read_file(location), self._spec).pixels)
            find_and_add([image_id], features[None], self._train, files)
        return files.find(image_id)


def open_bundle_of_run(bundle: str, referrals: Referrals) -> Bundle:
    """Load the bundle that graded the images of a review.

    Raises:
        UserError: Another bundle graded them, or several did, as for suspect labels. A store may have images
            of several.
    """
    if referrals.suspects is not None:
        raise UserError(
            f"the models of all folds graded {referrals.graded}, and a view is of one model; omit the bundle"
        )
    loaded = load_bundle(bundle)
    versions = pc.unique(referrals.queue.rows["model_version"]).to_pylist()
    other = [version for version in versions if version not in versions_of(loaded)]
    if other and not referrals.store:
        raise UserError(
            f"the bundle {bundle} is {loaded.spec.model_version}, but {other[0]} graded the images; give the "
            "bundle of the run"
        )
    return loaded


def open_comparing_bundle(bundle: Bundle | None, referrals: Referrals) -> Bundle:
    """Return the bundle whose features order the images as `diverse`: the given one, or that of the run.

    Raises:
        UserError: No bundle is given, and that of the run is not known or cannot be loaded.
    """
    if bundle:
        return bundle
    if not (of_run := referrals.bundle):
        raise UserError(
            f"the order diverse compares images by the features of a model, and {referrals.graded} does not "
            "name its bundle; name it with --bundle (review.bundle of the endpoint), or use informative"
        )
    try:
        return open_bundle_of_run(of_run, referrals)
    except UserError as error:
        raise UserError(
            f"the order diverse needs the bundle of the run, {of_run}: {error}, or use informative"
        ) from None


def graded_by(bundle: Bundle, rows: pa.Table) -> pa.Table:
    """Select the result rows of the images that a bundle graded."""
    return rows.filter(pc.is_in(rows["model_version"], pa.array(versions_of(bundle), pa.string())))


def versions_of(bundle: Bundle) -> list[str]:
    """Return the model versions in the rows that a bundle graded."""
    return [bundle.spec.version_in(precision) for precision in ("fp32", "int8")]
