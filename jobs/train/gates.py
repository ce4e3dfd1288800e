"""The gates of a bundle, fitted on the photographs that it was trained and validated on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.images import Columns, LoadImages, check_read, make_dataset, select_locations
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.statistics import Gates

# Enough for a covariance of twenty statistics many times over.
_MAX_TRAIN = 20_000
_BATCH = 32


def fit_gates(parts: dict[str, pa.Table], spec: Preprocess, seed: int = 0) -> Gates:
    """Measures the whole validation part and at most 20,000 photographs of the training part.

    Args:
        parts: manifest rows of `train` and `val`.
        spec: how the model's photographs are decoded: the statistics are of what it sees.
        seed: chooses the training photographs.

    Raises:
        UserError: a photograph cannot be read any more.
    """
    train = parts["train"]
    if train.num_rows > _MAX_TRAIN:
        chosen = np.random.default_rng(seed).choice(train.num_rows, _MAX_TRAIN, replace=False)
        train = train.take(np.sort(chosen))
    return image_statistics.fit_gates(_statistics(train, spec), _statistics(parts["val"], spec))


def _statistics(rows: pa.Table, spec: Preprocess) -> np.ndarray:
    dataset = make_dataset(select_locations(rows)).map_batches(_Measure(spec), batch_size=_BATCH)
    return np.concatenate([batch["statistics"] for batch in dataset.iter_batches(batch_size=None)])


class _Measure:
    """Statistics alone: the pixels stay in the task."""

    def __init__(self, spec: Preprocess) -> None:
        self._load = LoadImages(spec)

    def __call__(self, batch: Columns) -> Columns:
        loaded = self._load(batch)
        check_read(loaded)
        return {"statistics": loaded["statistics"]}
