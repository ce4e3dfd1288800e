"""Compute the features of the images of a queue, once; `FeatureFiles` keeps them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.console import console, progress_bar
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions, resolve
from jobs.evaluate.features import iterate_features
from scalp_core.bundles.bundle import Bundle
from scalp_core.review.features import FeatureFiles, pieces

BATCH_SIZE = 16


def compute_queue_features(bundle: Bundle, rows: pa.Table, files: FeatureFiles, executor: Executor) -> None:
    """Compute the features of the images that `files` does not have; an image that cannot be read has none.

    Args:
        bundle: Bundle that graded the images.
        rows: Result rows of the images.
        files: Files of this bundle; get the features.
        executor: Computes the features.
    """
    is_missing = [image_id not in files for image_id in rows["image_id"].to_pylist()]
    missing = rows.filter(pa.array(is_missing, pa.bool_()))
    if not missing.num_rows:
        return
    computation = resolve(ModelOptions(), executor.cluster(), missing.num_rows, executor)
    unreadable = 0
    with progress_bar("features of the queue", missing.num_rows) as (progress, task):
        for piece in pieces(missing):
            ids: list[str] = []
            features = []
            for batch in iterate_features(bundle, piece, computation, BATCH_SIZE, executor):
                readable = batch["error_code"] == ""
                ids += list(batch["image_id"][readable])
                features.append(batch["features"][readable])
                progress.update(task, advance=len(readable))
            unreadable += piece.num_rows - len(ids)
            if ids:
                files.add(ids, np.concatenate(features))
    if unreadable:
        console.print(
            f"{unreadable:,} of {missing.num_rows:,} images of the queue cannot be read: not compared"
        )
