"""Training images that look like the images of a queue, computed once and kept next to the label log.

LABELS/neighbors/KEY/train-HASH.parquet     features of 4,096 training images; HASH: of their ids
                     queue-HASH.parquet     ids of the neighbors of 4,096 images of a queue

KEY names the weights, the preprocessing and the data. Files are written atomically, so a stopped session
resumes, and several sessions may compute the same files.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

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
from scalp_core.datasets.locations import location_of
from scalp_core.labels.queue import Queue
from scalp_core.review.model_view import Neighbor
from scalp_core.storage import parquet

NEIGHBORS_FOLDER = "neighbors"
COUNT = 6
"""Most neighbors per image."""

_PIECE = 4_096  # images per file; with 2,048 features, 32 MiB in memory
_BATCH_SIZE = 16
_HASH_DIGITS = 20


def find_neighbors(
    bundle: Bundle, data: str, queue: Queue, labels: str, executor: Executor
) -> dict[str, list[Neighbor]]:
    """Find the training images that look most like each image of a queue, the most alike first.

    Args:
        bundle: Bundle whose features are compared.
        data: Directory that `scalp prepare` wrote; its train split is searched.
        queue: Images of the review.
        labels: Directory of the label log, which keeps what was computed.
        executor: Computes the features.

    Returns:
        Up to `COUNT` neighbors by `image_id`. An image that cannot be read has none.

    Raises:
        UserError: The data is invalid, or an image of its train split cannot be read any more.
    """
    train = manifest.select_split(manifest.read_manifest(data), "train")
    files = _Files(bundle, manifest.read_spec(data).sha256, labels)
    known = files.read_neighbors()
    missing = queue.rows.filter(pc.invert(pc.is_in(queue.rows["image_id"], pa.array(known, pa.string()))))
    if missing.num_rows:
        computation = resolve(ModelOptions(), executor.cluster(), train.num_rows, executor)
        _compute_train(bundle, train, files, computation, executor)
        for piece in _pieces(missing):
            known |= _compute_queue(bundle, piece, train, files, computation, executor)
    return _locate(known, train, queue)


def _compute_train(
    bundle: Bundle, train: pa.Table, files: _Files, computation: Computation, executor: Executor
) -> None:
    """Compute the features of the training images that no file has."""
    pending = [piece for piece in _pieces(train) if not storage.exists(files.train(piece))]
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
            parquet.write(files.train(piece), _encode(np.concatenate(ids), np.concatenate(features)))


def _compute_queue(
    bundle: Bundle,
    piece: pa.Table,
    train: pa.Table,
    files: _Files,
    computation: Computation,
    executor: Executor,
) -> dict[str, list[str]]:
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
        return {}
    nearest = NearestNeighbors(ids, np.concatenate(features), COUNT)
    with progress_bar("comparing with training images", train.num_rows) as (progress, task):
        for compared in _pieces(train):
            nearest.add(*_decode(parquet.read(files.train(compared))))
            progress.update(task, advance=compared.num_rows)
    neighbors = dict(zip(ids, nearest.find(), strict=True))
    parquet.write(files.queue(ids), pa.table({"image_id": ids, "neighbors": list(neighbors.values())}))
    return neighbors


def _locate(known: dict[str, list[str]], train: pa.Table, queue: Queue) -> dict[str, list[Neighbor]]:
    """Look the neighbors of the images of a queue up in the manifest."""
    wanted = {image_id: ids for image_id, ids in known.items() if image_id in queue}
    used = sorted({neighbor for ids in wanted.values() for neighbor in ids})
    rows = train.filter(pc.is_in(train["image_id"], pa.array(used, pa.string()))).to_pylist()
    by_id = {row["image_id"]: Neighbor(location_of(row), row["label"]) for row in rows}
    return {image_id: [by_id[neighbor] for neighbor in ids] for image_id, ids in wanted.items()}


def _pieces(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, _PIECE):
        yield rows.slice(start, _PIECE)


class _Files:
    """The files of one model and one data set below `LABELS/neighbors`."""

    def __init__(self, bundle: Bundle, data_sha256: str, labels: str) -> None:
        preprocess = bundle.spec.preprocess.model_dump_json()
        key = _hash([bundle.spec.weights_sha256, preprocess, data_sha256])
        self._folder = storage.join(labels, NEIGHBORS_FOLDER, key)

    def train(self, piece: pa.Table) -> str:
        return storage.join(self._folder, f"train-{_hash(piece['image_id'].to_pylist())}.parquet")

    def queue(self, ids: list[str]) -> str:
        return storage.join(self._folder, f"queue-{_hash(ids)}.parquet")

    def read_neighbors(self) -> dict[str, list[str]]:
        """Read the neighbors that earlier sessions found, by `image_id`."""
        names = sorted(name for name in storage.names_in(self._folder) if name.startswith("queue-"))
        tables = [parquet.read(storage.join(self._folder, name)) for name in names]
        return {row["image_id"]: row["neighbors"] for table in tables for row in table.to_pylist()}


def _hash(words: list[str]) -> str:
    return sha256("\n".join(words).encode()).hexdigest()[:_HASH_DIGITS]


def _encode(ids: np.ndarray, features: np.ndarray) -> pa.Table:
    """Make a table of features in half precision, whose length is 1."""
    halves = normalize_features(features).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), halves.shape[1])
    return pa.table({"image_id": pa.array(list(ids), pa.string()), "features": lists})


def _decode(table: pa.Table) -> tuple[list[str], np.ndarray]:
    ids = table["image_id"].to_pylist()
    return ids, table["features"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
