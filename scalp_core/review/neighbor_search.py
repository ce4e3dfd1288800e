"""Search the training images that look like some images, by the features that `scalp neighbors` stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.curation.nearest_neighbors import NearestNeighbors
from scalp_core.datasets import manifest
from scalp_core.review.features import decode_features, pieces
from scalp_core.review.neighbors import NEIGHBOR_COLUMNS, NeighborFiles
from scalp_core.storage import parquet

COUNT = 6
"""Most neighbors per image."""

MOST_SEARCHED = 20_000
"""Most images of prepared data that are searched while a reader waits: 80 MB of features of an Xception."""


def find_and_add(
    image_ids: Sequence[str],
    features: np.ndarray,
    train: pa.Table,
    files: NeighborFiles,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Find the training images that look most like each image, at most `COUNT`; add them to `files`.

    Args:
        image_ids: Ids of the images.
        features: float (N, D), features of the images.
        train: Rows of all training images, whose features have files.
        files: Files of the bundle and the data.
        advance: Gets the number of training images that were compared in each step.

    Raises:
        UserError: Storage failed.
    """
    nearest = NearestNeighbors(image_ids, features, COUNT)
    for piece in pieces(train):
        nearest.add(*decode_features(parquet.read(train_file(files, piece))))
        advance(piece.num_rows)
    neighbors = dict(zip(image_ids, nearest.find(), strict=True))
    used = pa.array({neighbor for found in neighbors.values() for neighbor in found}, pa.string())
    located = train.filter(pc.is_in(train["image_id"], used)).select(["image_id", *NEIGHBOR_COLUMNS])
    by_id = {row["image_id"]: row for row in located.to_pylist()}
    files.add({image_id: [by_id[neighbor] for neighbor in found] for image_id, found in neighbors.items()})


def train_file(files: NeighborFiles, piece: pa.Table) -> str:
    """Return the location of the features of a piece of the training images."""
    return files.train_file(piece["image_id"].to_pylist())


def read_searchable(data: str, files: NeighborFiles) -> pa.Table | None:
    """Read the rows of the training images, if a single image can be compared with all of them.

    Args:
        data: Directory that `scalp prepare` wrote.
        files: Files of a bundle and this data.

    Returns:
        The rows; None if features of training images are missing, or the data has too many images.

    Raises:
        UserError: The data is invalid, or storage failed.
    """
    if manifest.read_spec(data).photographs > MOST_SEARCHED:
        return None
    train = manifest.select_split(manifest.read_manifest(data), "train")
    train = train.select(["image_id", *NEIGHBOR_COLUMNS])
    return train if all(storage.exists(train_file(files, piece)) for piece in pieces(train)) else None
