"""Answers of a bundle to its validation images, stored in its run: out-of-fold answers of a fold."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.executor import Executor
from jobs.common.images import Columns
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import collect_finite_columns
from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.inference.fitting import flag_images
from scalp_core.inference.out_of_fold import OutOfFold
from scalp_core.storage import parquet

ANSWERS_FILE = "validation.parquet"
_COLUMNS = ["image_id", "sha256", "uri", "member", "label", "group", "fold"]


def store_answers(run: str, rows: pa.Table, columns: Columns, spec: BundleSpec) -> pa.Table:
    """Write the answers of a run's bundle to its validation images; return them.

    Args:
        run: Run directory.
        rows: Rows of the manifest, N.
        columns: `logits` float32 (N, 4) and `statistics` of the images.
        spec: Contract of the bundle, with its gates.

    Returns:
        The rows with `logits`, and `flagged`: whether a gate refers the image.
    """
    answers = {
        "logits": pa.array(columns["logits"].tolist(), pa.list_(pa.float32())),
        "flagged": pa.array(flag_images(spec, columns["statistics"])),
    }
    rows = rows.select(_COLUMNS)
    for name, column in answers.items():
        rows = rows.append_column(name, column)
    parquet.write(storage.join(run, ANSWERS_FILE), rows)
    return rows


def load_answers(
    run: str, table: pa.Table, options: ModelOptions, executor: Executor | None = None
) -> pa.Table:
    """Read the answers of a run's bundle to its validation images; without a file, compute and store them.

    Args:
        run: Run directory of a finished training.
        table: Manifest, with the fold of the training applied.
        options: Device of the model.
        executor: Runs the steps; default: Ray.

    Raises:
        UserError: As in `evaluate.driver.collect_finite_columns`.
    """
    uri = storage.join(run, ANSWERS_FILE)
    if storage.exists(uri) and set(_COLUMNS) <= set((stored := parquet.read(uri)).column_names):
        return stored  # an older version stored fewer columns
    bundle, rows = load_bundle(run), manifest.select_split(table, "val")
    columns, _ = collect_finite_columns(bundle, rows, options, executor)
    return store_answers(run, rows, columns, bundle.spec)


def as_answers(rows: pa.Table) -> OutOfFold:
    """Convert rows of `load_answers`, of one or several folds, to arrays."""
    logits, flagged, labels, folds = (
        np.array(rows[name].to_pylist()) for name in ("logits", "flagged", "label", "fold")
    )
    return OutOfFold(logits, flagged, labels, rows["group"].to_pylist(), folds)
