"""Model actor of `scalp grade`: grade a loaded shard, and commit its rows."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jobs.common.console import timed
from jobs.common.images import Columns
from jobs.grade.files import INPUTS_KEY, RETRY_TIMEOUT_S, graded_file
from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.results import drift
from scalp_core.results.schema import Signature, result_table
from scalp_core.storage import parquet


@dataclass(frozen=True)
class LoadedShard:
    """Shard, or piece of a tar, on its way from a loading task to a model; Ray does not copy its pixels.

    Args:
        name: Name of its file of rows.
        rows: Columns of `LoadImages`, with `image` uint8 (N, size, size, 3).
        seconds: Seconds per stage so far.
    """

    name: str
    rows: Columns
    seconds: dict[str, float]


class Model(Protocol):
    """Model that computes logits of pixels: `predictor.Predictor`, or the replacement of a benchmark."""

    def logits(self, images: np.ndarray) -> np.ndarray: ...


class GradeShard:
    """Actor: grade a shard and atomically commit its rows.

    Thread-safe: the model computes one shard while another thread commits the one before, so that a GPU does
    not wait for files.

    Args:
        work: Folder of the run.
        spec: Contract of the bundle.
        signature: Signature of the rows.
        model: Makes the model in this process.
        batch_size: Maximum number of images per forward pass.
    """

    def __init__(
        self,
        work: str,
        spec: BundleSpec,
        signature: Signature,
        model: Callable[[], Model],
        batch_size: int,
    ) -> None:
        self._work = work
        self._spec = spec
        self._signature = signature
        self._batch_size = batch_size
        self._refused: UserError | None = None
        try:
            self._model = model()
        except UserError as error:  # raised by the first call: Ray would retry a constructor
            self._refused = error
        self._lock = threading.Lock()
        self._free = time.monotonic()

    def __call__(self, shard: LoadedShard) -> dict[str, Any]:
        """Grade and commit a shard; return its name, `rows`, `errors` (by code) and `seconds` per stage."""
        if self._refused:  # the run is ending
            raise self._refused
        with self._lock:
            seconds = shard.seconds | {"wait": time.monotonic() - self._free}
            with timed(seconds, "model"):
                logits = self._logits(shard.rows)
            self._free = time.monotonic()
        with timed(seconds, "commit"), storage.retry_timeout(RETRY_TIMEOUT_S):
            table = self._table(shard.rows, logits)
            parquet.write(graded_file(self._work, shard.name), table)
        errors = Counter(code for code in shard.rows["error_code"].tolist() if code)
        return {"shard": shard.name, "rows": table.num_rows, "errors": dict(errors), "seconds": seconds}

    def _logits(self, rows: Columns) -> np.ndarray:
        good, images = rows["error_code"] == "", rows["image"]
        logits = np.zeros((len(good), NUM_GRADES * self._spec.symptoms), np.float32)
        if not good.all():
            images = images[good]
        starts = range(0, len(images), self._batch_size)
        batches = [self._model.logits(images[start : start + self._batch_size]) for start in starts]
        if batches:
            logits[good] = np.concatenate(batches)
        return logits

    def _table(self, rows: Columns, logits: np.ndarray) -> pa.Table:
        table = result_table(rows, logits, self._spec, self._signature)
        if self._spec.gates is None:
            return table
        inputs = drift.count_statistics(rows["statistics"][rows["error_code"] == ""], self._spec.gates)
        return table.replace_schema_metadata({INPUTS_KEY: inputs.model_dump_json()})
