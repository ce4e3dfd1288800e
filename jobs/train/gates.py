"""Fit the gates of a bundle on images of its training and validation splits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.images import Columns, LoadImages, check_read, select_locations
from jobs.common.ray_executor import make_dataset
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.statistics import Gates

# More than enough for a covariance of twenty statistics.
_MAX_TRAIN = 20_000
_BATCH = 32


def fit_gates(splits: dict[str, pa.Table], spec: Preprocess) -> Gates:
    """Fit gates on the whole validation split and at most 20,000 images of the training split.

    Args:
        splits: Manifest rows of `train` and `val`.
        spec: Preprocessing of the model, because the statistics describe its input.

    Raises:
        UserError: An image is no longer readable.
    """
    train = splits["train"]
    if train.num_rows > _MAX_TRAIN:
        chosen = np.random.default_rng(0).choice(train.num_rows, _MAX_TRAIN, replace=False)
        train = train.take(np.sort(chosen))
    return image_statistics.fit_gates(_statistics(train, spec), _statistics(splits["val"], spec))


def _statistics(rows: pa.Table, spec: Preprocess) -> np.ndarray:
    dataset = make_dataset(select_locations(rows)).map_batches(_Measure(spec), batch_size=_BATCH)
    return np.concatenate([batch["statistics"] for batch in dataset.iter_batches(batch_size=None)])


class _Measure:
    """Measure image statistics and drop the pixels, so that they stay in the task."""

    def __init__(self, spec: Preprocess) -> None:
        self._load = LoadImages(spec)

    def __call__(self, batch: Columns) -> Columns:
        loaded = self._load(batch)
        check_read(loaded)
        return {"statistics": loaded["statistics"]}
