"""Compute the training images that look like the images of a queue, once; `NeighborFiles` keeps them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.console import console, progress_bar
from jobs.common.executor import Executor
from jobs.common.images import check_read
from jobs.common.inference import Computation, ModelOptions, resolve
from jobs.evaluate.features import iterate_features
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.curation.nearest_neighbors import NearestNeighbors, normalize_features
from scalp_core.datasets import manifest
from scalp_core.review.neighbors import NEIGHBOR_COLUMNS, NeighborFiles
from scalp_core.storage import parquet

COUNT = 6
"""Most neighbors per image."""

_PIECE = 4_096  # images per file; with 2,048 features, 32 MiB in memory
_BATCH_SIZE = 16


def find_neighbors(
    bundle: Bundle, data: str, rows: pa.Table, files: NeighborFiles, executor: Executor
) -> None:
    """Find the training images that look most like each image, at most `COUNT`; add them to `files`.

    Images of which `files` has neighbors are skipped. An image that cannot be read has none.

    Args:
        bundle: Bundle whose features are compared.
        data: Directory that `scalp prepare` wrote; its train split is searched.
        rows: Result rows of the images.
        files: Files of this bundle and data.
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
    for piece in _pieces(missing):
        _compute_queue(bundle, piece, train, files, computation, executor)


def _compute_train(
    bundle: Bundle, train: pa.Table, files: NeighborFiles, computation: Computation, executor: Executor
) -> None:
    """Compute the features of the training images that no file has."""
    pending = [piece for piece in _pieces(train) if not storage.exists(_train_file(files, piece))]
    images = sum(piece.num_rows for piece in pending)
    if not images:
        return
    with progress_bar("features of training images", images) as (progress, task):
        for piece in pending:
            ids, features = [], []
            for batch in iterate_features(bundle, piece, computation, _BATCH_SIZE, executor):
                check_read(batch)
                ids.append(batch["image_id"])
                features.append(batch["features"])
                progress.update(task, advance=len(batch["image_id"]))
            parquet.write(_train_file(files, piece), _encode(np.concatenate(ids), np.concatenate(features)))


def _compute_queue(
    bundle: Bundle,
    piece: pa.Table,
    train: pa.Table,
    files: NeighborFiles,
    computation: Computation,
    executor: Executor,
) -> None:
    """Find and store the neighbors of some images of the queue, among all training images."""
    ids: list[str] = []
    features = []
    with progress_bar("features of the queue", piece.num_rows) as (progress, task):
        for batch in iterate_features(bundle, piece, computation, _BATCH_SIZE, executor):
            readable = batch["error_code"] == ""
            ids += list(batch["image_id"][readable])
            features.append(batch["features"][readable])
            progress.update(task, advance=len(readable))
    if unreadable := piece.num_rows - len(ids):
        console.print(
            f"{unreadable:,} of {piece.num_rows:,} images of the queue cannot be read: no similar images"
        )
    if not ids:
        return
    nearest = NearestNeighbors(ids, np.concatenate(features), COUNT)
    with progress_bar("comparing with training images", train.num_rows) as (progress, task):
        for compared in _pieces(train):
            nearest.add(*_decode(parquet.read(_train_file(files, compared))))
            progress.update(task, advance=compared.num_rows)
    neighbors = dict(zip(ids, nearest.find(), strict=True))
    used = pa.array({neighbor for found in neighbors.values() for neighbor in found}, pa.string())
    located = train.filter(pc.is_in(train["image_id"], used)).select(["image_id", *NEIGHBOR_COLUMNS])
    by_id = {row["image_id"]: row for row in located.to_pylist()}
    files.add({image_id: [by_id[neighbor] for neighbor in found] for image_id, found in neighbors.items()})


def _pieces(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, _PIECE):
        yield rows.slice(start, _PIECE)


def _train_file(files: NeighborFiles, piece: pa.Table) -> str:
    return files.train_file(piece["image_id"].to_pylist())


def _encode(ids: np.ndarray, features: np.ndarray) -> pa.Table:
    """Make a table of features in half precision, whose length is 1."""
    halves = normalize_features(features).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), halves.shape[1])
    return pa.table({"image_id": pa.array(list(ids), pa.string()), "features": lists})


def _decode(table: pa.Table) -> tuple[list[str], np.ndarray]:
    ids = table["image_id"].to_pylist()
    return ids, table["features"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
