"""Compute the training images that look like the images of a queue, once; `NeighborFiles` keeps them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.console import progress_bar
from jobs.common.executor import Executor
from jobs.common.images import check_read
from jobs.common.inference import Computation, ModelOptions, resolve
from jobs.evaluate.features import iterate_features
from jobs.review.features import BATCH_SIZE, compute_queue_features, pieces
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.curation.nearest_neighbors import NearestNeighbors
from scalp_core.datasets import manifest
from scalp_core.review.features import FeatureFiles, decode_features, encode_features
from scalp_core.review.neighbors import NEIGHBOR_COLUMNS, NeighborFiles
from scalp_core.storage import parquet

COUNT = 6
"""Most neighbors per image."""


def find_neighbors(
    bundle: Bundle,
    data: str,
    rows: pa.Table,
    files: NeighborFiles,
    features: FeatureFiles,
    executor: Executor,
) -> None:
    """Find the training images that look most like each image, at most `COUNT`; add them to `files`.

    Images of which `files` has neighbors are skipped. An image that cannot be read has none.

    Args:
        bundle: Bundle whose features are compared.
        data: Directory that `scalp prepare` wrote; its train split is searched.
        rows: Result rows of the images.
        files: Files of this bundle and data.
        features: Features of the queue by this bundle; missing ones are computed.
        executor: Computes the features.

    Raises:
        UserError: The data is invalid, or an image of its train split cannot be read any more.
    """
    is_missing = [image_id not in files for image_id in rows["image_id"].to_pylist()]
    missing = rows.filter(pa.array(is_missing, pa.bool_()))
    if not missing.num_rows:
        return
    train = manifest.select_split(manifest.read_manifest(data), "train")
    computation = resolve(ModelOptions(), executor.cluster(), train.num_rows, executor)
    _compute_train(bundle, train, files, computation, executor)
    compute_queue_features(bundle, missing, features, executor)
    for piece in pieces(missing):
        _compare_queue(piece, train, files, features)


def _compute_train(
    bundle: Bundle, train: pa.Table, files: NeighborFiles, computation: Computation, executor: Executor
) -> None:
    """Compute the features of the training images that no file has."""
    pending = [piece for piece in pieces(train) if not storage.exists(_train_file(files, piece))]
    images = sum(piece.num_rows for piece in pending)
    if not images:
        return
    with progress_bar("features of training images", images) as (progress, task):
        for piece in pending:
            ids, features = [], []
            for batch in iterate_features(bundle, piece, computation, BATCH_SIZE, executor):
                check_read(batch)
                ids.append(batch["image_id"])
                features.append(batch["features"])
                progress.update(task, advance=len(batch["image_id"]))
            ids_of_piece = np.concatenate(ids).tolist()
            parquet.write(_train_file(files, piece), encode_features(ids_of_piece, np.concatenate(features)))


def _compare_queue(piece: pa.Table, train: pa.Table, files: NeighborFiles, features: FeatureFiles) -> None:
    """Find and store the neighbors of some images of the queue, among all training images."""
    ids, of_queue = features.read(piece["image_id"].to_pylist())
    if not ids:
        return
    nearest = NearestNeighbors(ids, of_queue, COUNT)
    with progress_bar("comparing with training images", train.num_rows) as (progress, task):
        for compared in pieces(train):
            nearest.add(*decode_features(parquet.read(_train_file(files, compared))))
            progress.update(task, advance=compared.num_rows)
    neighbors = dict(zip(ids, nearest.find(), strict=True))
    used = pa.array({neighbor for found in neighbors.values() for neighbor in found}, pa.string())
    located = train.filter(pc.is_in(train["image_id"], used)).select(["image_id", *NEIGHBOR_COLUMNS])
    by_id = {row["image_id"]: row for row in located.to_pylist()}
    files.add({image_id: [by_id[neighbor] for neighbor in found] for image_id, found in neighbors.items()})


def _train_file(files: NeighborFiles, piece: pa.Table) -> str:
    return files.train_file(piece["image_id"].to_pylist())
