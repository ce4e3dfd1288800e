"""Compute the training images that look like the images of a queue, once; `NeighborFiles` keeps them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.console import progress_bar
from jobs.common.executor import Executor
from jobs.common.images import check_read
from jobs.common.inference import Computation, ModelOptions, resolve
from jobs.evaluate.features import iterate_features
from jobs.review.features import BATCH_SIZE, compute_queue_features
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.datasets import manifest
from scalp_core.review.features import FeatureFiles, encode_features, pieces
from scalp_core.review.neighbor_search import find_and_add, train_file
from scalp_core.review.neighbors import NeighborFiles
from scalp_core.storage import parquet


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
    # Also of images whose neighbors are known, as those that an endpoint searched: an order compares them.
    compute_queue_features(bundle, rows, features, executor)
    is_missing = [image_id not in files for image_id in rows["image_id"].to_pylist()]
    missing = rows.filter(pa.array(is_missing, pa.bool_()))
    if not missing.num_rows and len(files):
        return  # without images of the queue, as of a new store, the endpoint compares them later
    train = manifest.select_split(manifest.read_manifest(data), "train")
    computation = resolve(ModelOptions(), executor.cluster(), train.num_rows, executor)
    _compute_train(bundle, train, files, computation, executor)
    for piece in pieces(missing):
        _compare_queue(piece, train, files, features)


def _compute_train(
    bundle: Bundle, train: pa.Table, files: NeighborFiles, computation: Computation, executor: Executor
) -> None:
    """Compute the features of the training images that no file has."""
    pending = [piece for piece in pieces(train) if not storage.exists(train_file(files, piece))]
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
            parquet.write(train_file(files, piece), encode_features(ids_of_piece, np.concatenate(features)))


def _compare_queue(piece: pa.Table, train: pa.Table, files: NeighborFiles, features: FeatureFiles) -> None:
    """Find and store the neighbors of some images of the queue, among all training images."""
    ids, of_queue = features.read(piece["image_id"].to_pylist())
    if not ids:
        return
    with progress_bar("comparing with training images", train.num_rows) as (progress, task):
        find_and_add(ids, of_queue, train, files, lambda images: progress.update(task, advance=images))
