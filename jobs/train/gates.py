"""Fit the gates of a bundle on images of its training and validation splits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from joblib import cpu_count

from jobs.common.images import Columns, LoadImages, check_read, select_locations, to_columns
from jobs.common.ray_executor import make_dataset
from scalp_core.images import gates
from scalp_core.images.gates import Gates
from scalp_core.images.preprocess import Preprocess

# More than enough for a covariance of twenty statistics.
_MAX_TRAIN = 20_000
_BATCH = 32


def fit_gates(train: pa.Table, val: np.ndarray, spec: Preprocess, in_ray: bool) -> Gates:
    """Fit gates on at most 20,000 images of the training split and the validation split.

    Args:
        train: Manifest rows of the training split.
        val: Statistics of the images of the validation split, float (N, K).
        spec: Preprocessing of the model, because the statistics describe its input.
        in_ray: Whether Ray measures the images; else threads of this process.

    Raises:
        UserError: An image is no longer readable.
    """
    if train.num_rows > _MAX_TRAIN:
        chosen = np.random.default_rng(0).choice(train.num_rows, _MAX_TRAIN, replace=False)
        train = train.take(np.sort(chosen))
    rows, measure = select_locations(train, "group"), _Measure(spec)
    if in_ray:
        measured = make_dataset(rows).map_batches(measure, batch_size=_BATCH)
        batches = list(measured.iter_batches(batch_size=None))
    else:
        pieces = [to_columns(rows.slice(start, _BATCH)) for start in range(0, rows.num_rows, _BATCH)]
        with ThreadPoolExecutor(cpu_count(), "measure") as pool:
            batches = list(pool.map(measure, pieces))
    statistics, groups = (
        np.concatenate([batch[name] for batch in batches]) for name in ("statistics", "group")
    )
    return gates.fit_gates(statistics, val, groups.tolist())


class _Measure:
    """Measure image statistics and drop the pixels, so that they stay in the task."""

    def __init__(self, spec: Preprocess) -> None:
        self._load = LoadImages(spec)

    def __call__(self, batch: Columns) -> Columns:
        loaded = self._load(batch)
        check_read(loaded)
        return {"statistics": loaded["statistics"], "group": batch["group"]}
