"""Model actor of `scalp grade`: grade a loaded shard, and commit its rows.

A shard passes from loading tasks to models as one row, so Ray does not split it: columns of its images, their
pixels, and the seconds per stage so far.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa

from jobs.common.console import timed
from jobs.common.images import Columns
from jobs.grade.files import INPUTS_KEY, RETRY_TIMEOUT_S, STARTED, graded_file
from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.results import drift
from scalp_core.results.schema import Signature, result_table
from scalp_core.storage import parquet
from scalp_core.storage.lease import Guard

Seconds = dict[str, float]


class Model(Protocol):
    """Model that computes logits of pixels: `predictor.Predictor`, or the replacement of a benchmark."""

    def logits(self, images: np.ndarray) -> np.ndarray: ...


class GradeShard:
    """Actor: grade a shard and atomically commit its rows before it takes the next one.

    Args:
        work: Folder of the run.
        guard: Guard of the run's lease; a run that lost its lease starts no more shards.
        spec: Contract of the bundle.
        signature: Signature of the rows.
        model: Makes the model in this process.
        batch_size: Maximum number of images per forward pass.
    """

    def __init__(
        self,
        work: str,
        guard: Guard,
        spec: BundleSpec,
        signature: Signature,
        model: Callable[[], Model],
        batch_size: int,
    ) -> None:
        self._work = work
        self._guard = guard
        self._spec = spec
        self._signature = signature
        self._batch_size = batch_size
        self._marks = ThreadPoolExecutor(1)  # writes marks while the model computes
        self._refused: UserError | None = None
        try:
            self._model = model()
        except UserError as error:  # raised by the first call: Ray would retry a constructor
            self._refused = error
        self._free = time.monotonic()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self._refused:  # the run is ending
            raise self._refused
        waited = time.monotonic() - self._free
        for shard, rows, images, seconds in unpack_shards(batch, self._spec.preprocess.size):
            try:
                table = self._commit(shard, rows, images, seconds)
            except UserError as error:
                self._refused = error
                raise
            errors = Counter(code for code in rows["error_code"].tolist() if code)
            yield pa.table(
                {
                    "rows": [table.num_rows],
                    "failed": [errors.total()],
                    "errors": [json.dumps(errors)],
                    "seconds": [json.dumps(seconds | {"wait": waited})],
                }
            )
        self._free = time.monotonic()

    def _commit(self, shard: str, rows: Columns, images: np.ndarray, seconds: Seconds) -> pa.Table:
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            marked = self._marks.submit(self._mark, shard)
            with timed(seconds, "model"):
                table = self._grade(rows, images)
            with timed(seconds, "commit"):
                marked.result()
                parquet.write(graded_file(self._work, shard), table)
        return table

    def _mark(self, shard: str) -> None:
        """Record that a model started a shard."""
        self._guard.check()
        mark = storage.join(self._work, STARTED, f"{shard}.{uuid.uuid4().hex[:8]}")
        storage.write(mark, b"", durable=False)

    def _grade(self, rows: Columns, images: np.ndarray) -> pa.Table:
        good = rows["error_code"] == ""
        logits = np.zeros((len(good), len(self._spec.grade_names)), np.float32)
        if good.any():
            logits[good] = self._logits(images if good.all() else images[good])
        table = result_table(rows, logits, self._spec, self._signature)
        if self._spec.gates is None:
            return table
        inputs = drift.count_statistics(rows["statistics"][good], self._spec.gates)
        return table.replace_schema_metadata({INPUTS_KEY: inputs.model_dump_json()})

    def _logits(self, images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), self._batch_size)
        return np.concatenate(
            [self._model.logits(images[start : start + self._batch_size]) for start in starts]
        )


def pack_shard(shard: str, rows: Columns, seconds: Seconds) -> pa.Table:
    """Pack a shard into one row: name, columns without pixels, pixels (not copied), seconds per stage."""
    images = np.ascontiguousarray(rows["image"])
    columns = {name: pa.array(values) for name, values in rows.items() if name not in ("image", "statistics")}
    statistics = rows["statistics"]
    columns["statistics"] = pa.FixedSizeListArray.from_arrays(statistics.ravel(), statistics.shape[1])
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table(
        {
            "shard": [shard],
            "rows": _one(sink.getvalue()),
            "pixels": _one(pa.py_buffer(images.reshape(-1))),
            "seconds": [json.dumps(seconds)],
        }
    )


def unpack_shards(batch: pa.Table, size: int) -> Iterator[tuple[str, Columns, np.ndarray, Seconds]]:
    """Inverse of `pack_shard`, per row: name, columns, read-only uint8 (N, size, size, 3), seconds."""
    for index in range(batch.num_rows):
        table = pa.ipc.open_stream(_buffer(batch["rows"], index)).read_all()
        rows = {name: table[name].to_numpy() for name in table.column_names if name != "statistics"}
        statistics = table["statistics"].combine_chunks()
        rows["statistics"] = statistics.flatten().to_numpy().reshape(len(statistics), -1)
        pixels = np.frombuffer(_buffer(batch["pixels"], index), np.uint8)
        seconds = json.loads(batch["seconds"][index].as_py())
        yield str(batch["shard"][index]), rows, pixels.reshape(table.num_rows, size, size, 3), seconds


def _buffer(column: pa.ChunkedArray, index: int) -> pa.Buffer:
    """Buffer of one binary value, not copied; Arrow's scalar copies (30 ms for 512 images at 224 px)."""
    (value,) = column.slice(index, 1).chunks
    begin, end = np.frombuffer(value.buffers()[1], np.int32)[value.offset : value.offset + 2].tolist()
    return value.buffers()[2].slice(begin, end - begin)


def _one(data: pa.Buffer) -> pa.Array:
    """Array of one binary value, not copied."""
    ends = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, ends, data])
