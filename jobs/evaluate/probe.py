"""The linear probe of `scalp evaluate`: what training reached beyond its frozen initial weights."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.common.console import console
from jobs.common.executor import Executor
from jobs.common.inference import Computation
from jobs.evaluate.features import compute_features
from scalp_core import storage
from scalp_core.bundles.bundle import INITIAL_FILE, Bundle
from scalp_core.bundles.contract import WEIGHTS_FILE
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.evaluation import metrics
from scalp_core.evaluation.linear_probe import predict_linear_probe

MAX_IMAGES = 2000
"""Most training images of the probe: its cost is one forward pass over these and the evaluated images."""

_SEED = 0


def evaluate_probe(
    loaded: Bundle,
    data: DataSpec,
    table: pa.Table,
    split: str,
    computation: Computation,
    batch_size: int,
    executor: Executor,
) -> dict[str, Any]:
    """Evaluate a logistic regression on features of the initial weights of a bundle's run.

    Args:
        loaded: Bundle in its run directory, which holds the initial weights.
        data: Contract of the data.
        table: Manifest of the data; the probe is fitted on at most `MAX_IMAGES` images of its train split.
        split: Split to grade.
        computation: Device and precision.
        batch_size: Images per forward pass.
        executor: Runs the steps.

    Returns:
        `metrics`, or None and the reason in `note`; `images` and `of`: used and all training images;
        `strength`: inverse regularization; `initial_weights`; `seconds`.
    """
    uri = storage.join(str(loaded.uri).rpartition("/")[0], INITIAL_FILE)
    if data.sha256 != loaded.spec.training.data_sha256 or split == "train":
        return omit_probe("it needs the val or test split of the data of the training")
    if loaded.uri is None or not storage.exists(uri):
        return omit_probe(f"the bundle is not in its run directory, which holds {INITIAL_FILE}")
    started = time.monotonic()
    train, rows = (manifest.select_split(table, name) for name in ("train", split))
    count = min(MAX_IMAGES, train.num_rows)
    used = train.take(np.sort(np.random.default_rng(_SEED).choice(train.num_rows, count, replace=False)))
    labels, truth = (np.array(each["label"].to_pylist()) for each in (used, rows))
    if len(np.unique(labels)) < 2:
        return omit_probe("the training images have a single grade")
    initial = Bundle(loaded.spec, files={WEIGHTS_FILE: storage.read(uri)})
    with console.status(f"linear probe: features of {count + rows.num_rows} images"):
        both = pa.concat_tables([used, rows])  # the models start once
        features = compute_features(initial, both, computation, batch_size, executor)
        fitted, others = features[:count], features[count:]
        probs, strength = predict_linear_probe(fitted, labels, used["group"].to_pylist(), others)
    return {
        "metrics": metrics.score(truth, probs.argmax(axis=1)) | metrics.score_probabilities(truth, probs),
        "images": count,
        "of": train.num_rows,
        "strength": strength,
        "initial_weights": str(loaded.spec.training.initial_weights),
        "seconds": round(time.monotonic() - started, 1),
        "note": None,
    }


def omit_probe(note: str) -> dict[str, Any]:
    """Return the record of a probe that was not computed, with the reason."""
    return {"metrics": None, "note": note}
