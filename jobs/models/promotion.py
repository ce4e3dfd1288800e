"""A version compared with the promoted one before it takes its place: both on the same labeled images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import collect
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Evidence, Registry
from scalp_core.datasets import manifest
from scalp_core.evaluation import noninferiority, subgroups
from scalp_core.evaluation.noninferiority import Answers
from scalp_core.inference import calibration
from scalp_core.inference.decision import make_gradings

_SPLIT = "test"  # of the data that a bundle was made with, the only one that decided nothing of it


def compare_versions(
    store: Registry, name: str, promoted: int, version: int, data: str, max_drop: float, options: ModelOptions
) -> Evidence:
    """Bound what a version loses against the promoted one, on the test split of prepared data.

    Args:
        store: the registry.
        name: of the model.
        promoted: version in use.
        version: to promote.
        data: directory that `scalp prepare` wrote.
        max_drop: largest acceptable upper bound of the loss of kappa and of coverage.
        options: how both models run.

    Raises:
        UserError: the data or a bundle cannot be read.
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
    found, _ = collect(bundle, rows, options)
    answers = make_gradings(found["logits"], found["statistics"], bundle.spec)
    probs = np.array([answer.probabilities for answer in answers])
    finite = calibration.finite_rows(found["logits"])
    grades = subgroups.penalize_not_finite(labels, probs, finite).argmax(axis=1)
    return Answers(grades, subgroups.is_in_set(labels, [answer.grade_set for answer in answers]))
