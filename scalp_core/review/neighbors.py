"""Training images that look like the images of a queue: the files of `scalp neighbors` and `scalp review`.

LABELS/neighbors/KEY/train-HASH.parquet     features of 4,096 training images; HASH: of their ids
                     similar-HASH.parquet   neighbors of up to 4,096 images of a queue: locations and grades

KEY names the weights, the preprocessing and the data: files of another model or data set have another folder.
Files are written atomically, so a stopped command resumes, and several may compute the same files.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec
from scalp_core.datasets import manifest
from scalp_core.datasets.locations import LOCATION_COLUMNS, Location, location_of
from scalp_core.errors import ImageError
from scalp_core.review.features import hash_words
from scalp_core.review.pictures import read_jpeg
from scalp_core.storage import parquet

NEIGHBORS_FOLDER = "neighbors"
NEIGHBOR_COLUMNS = (*LOCATION_COLUMNS, "label")
"""Columns of the manifest that a neighbor has."""

MAX_SIDE = 384
"""Longest side of the picture of a training image, in pixels."""

_SIMILAR = "similar-"


@dataclass(frozen=True)
class Neighbor:
    """A training image that looks like an image of the queue."""

    location: Location
    grade: int


class NeighborFiles:
    """The similar training images that one model found in one data set; threads may share it.

    Args:
        spec: Contract of the bundle whose features were compared.
        data: Directory that `scalp prepare` wrote.
        labels: Directory of the label log.

    Raises:
        UserError: The data is invalid, or storage failed.
    """

    def __init__(self, spec: BundleSpec, data: str, labels: str) -> None:
        key = hash_words(
            [spec.weights_sha256, spec.preprocess.model_dump_json(), manifest.read_spec(data).sha256]
        )
        self._folder = storage.join(labels, NEIGHBORS_FOLDER, key)
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self._rows: dict[str, pa.ListScalar] = {}
        self.read_new()

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def read_new(self) -> None:
        """Read the files that were added since the last call.

        Raises:
            UserError: Storage failed.
        """
        with self._lock:
            names = (name for name in storage.names_in(self._folder) if name.startswith(_SIMILAR))
            for name in sorted(set(names) - self._read):
                self._keep(parquet.read(storage.join(self._folder, name)))
                self._read.add(name)

    def find(self, image_id: str) -> list[Neighbor]:
        """Return the training images that look most like an image, the most alike first."""
        rows = self._rows[image_id].as_py() if image_id in self._rows else []
        return [Neighbor(location_of(row), row["label"]) for row in rows]

    def add(self, neighbors: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Store the neighbors of some images by `image_id`: values of `NEIGHBOR_COLUMNS`, the nearest first.

        Raises:
            UserError: Storage failed.
        """
        schema = manifest.SCHEMA
        fields = [schema.field(name).with_nullable(True) for name in NEIGHBOR_COLUMNS]
        columns = pa.schema({"image_id": pa.string(), "neighbors": pa.list_(pa.struct(fields))})
        rows = [{"image_id": image_id, "neighbors": list(found)} for image_id, found in neighbors.items()]
        table = pa.Table.from_pylist(rows, schema=columns)
        name = f"{_SIMILAR}{hash_words(neighbors)}.parquet"
        parquet.write(storage.join(self._folder, name), table)
        with self._lock:
            self._keep(table)
            self._read.add(name)

    def train_file(self, image_ids: Iterable[str]) -> str:
        """Return the location of the file with the features of these training images."""
        return storage.join(self._folder, f"train-{hash_words(image_ids)}.parquet")

    def _keep(self, table: pa.Table) -> None:
        # Values of Arrow, which share the memory of the table: objects of Python would take 20 times as much.
        self._rows.update(zip(table["image_id"].to_pylist(), table["neighbors"], strict=True))


def show_neighbors(neighbors: Sequence[Neighbor]) -> list[dict[str, Any]]:
    """Read the pictures of training images for the page.

    Returns:
        Per neighbor its `grade`, and as `picture` the base64 of a JPEG; None if the image cannot be read.
    """
    return [{"grade": neighbor.grade, "picture": _picture(neighbor.location)} for neighbor in neighbors]


def _picture(location: Location) -> str | None:
    try:
        return base64.b64encode(read_jpeg(location, MAX_SIDE)).decode()
    except ImageError:
        return None  # the log has the reason of a failed read
