"""Compare a version with the promoted one before promotion, on the same labeled images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import collect_columns
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Evidence, Registry
from scalp_core.datasets import manifest
from scalp_core.evaluation import noninferiority, subgroups
from scalp_core.evaluation.noninferiority import Answers
from scalp_core.inference import calibration
from scalp_core.inference.decision import make_gradings

_SPLIT = "test"  # the only split of its data that did not influence a bundle


def compare_versions(
    store: Registry, name: str, promoted: int, version: int, data: str, max_drop: float, options: ModelOptions
) -> Evidence:
    """Bound what a version loses against the promoted one, on the test split of prepared data.

    Args:
        data: Directory that `scalp prepare` wrote.
        max_drop: Largest acceptable upper bound of the loss of kappa and of coverage.

    Raises:
        UserError: The data or a bundle cannot be read.
    """
    data_sha256 = manifest.read_spec(data).sha256
    rows = manifest.select_split(manifest.read_manifest(data), _SPLIT)
    labels = np.array(rows["label"].to_pylist())
    before, after = (load_bundle(store.uri(name, number)) for number in (promoted, version))
    comparison = noninferiority.compare(
        labels,
        _answers(before, rows, labels, options),
        _answers(after, rows, labels, options),
        rows["group"].to_pylist(),
        after.spec.conformal.coverage,
        max_drop,
    )
    return Evidence(
        against=promoted,
        against_model=before.spec.model_version,
        data=data,
        data_sha256=data_sha256,
        same_data=after.spec.training.data_sha256 == data_sha256,
        comparison=comparison,
    )


def _answers(bundle: Bundle, rows: pa.Table, labels: np.ndarray, options: ModelOptions) -> Answers:
    columns, _ = collect_columns(bundle, rows, options)
    answers = make_gradings(columns["logits"], columns["statistics"], bundle.spec)
    probs = np.array([answer.probabilities for answer in answers])
    finite = calibration.finite_rows(columns["logits"])
    grades = subgroups.penalize_not_finite(labels, probs, finite).argmax(axis=1)
    return Answers(grades, subgroups.is_in_set(labels, [answer.grade_set for answer in answers]))
