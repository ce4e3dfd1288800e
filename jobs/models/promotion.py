"""Assess a version before promotion: compare it with the promoted one, and apply the model's policy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import check_symptom, collect_columns, make_answers
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Registry
from scalp_core.bundles.registry_records import Evidence
from scalp_core.datasets import manifest
from scalp_core.evaluation import noninferiority, subgroups
from scalp_core.evaluation.paired import Answers
from scalp_core.evaluation.promotion_policy import PolicyFile, PolicyResult

_SPLIT = "test"  # the only split of its data that did not influence a bundle


def assess_version(
    store: Registry,
    name: str,
    version: int,
    promoted: int | None,
    data: str,
    max_drop: float,
    policy: PolicyFile | None,
    options: ModelOptions,
    executor: Executor | None,
) -> tuple[Evidence | None, PolicyResult | None]:
    """Assess a version on the test split of prepared data.

    Args:
        version: Number of the version.
        promoted: Number of the promoted version; None if there is none.
        data: Directory that `scalp prepare` wrote.
        max_drop: Largest acceptable upper bound of the loss of kappa and of coverage.
        policy: The model's policy; None if it has none.
        executor: Runs the models; None: Ray.

    Returns:
        What the version may lose against the promoted one, and the decision of the policy.

    Raises:
        UserError: The data or a bundle cannot be read, the policy does not list the data, or a rule fails.
    """
    data_spec = manifest.read_spec(data)
    data_sha256 = data_spec.sha256
    if policy:
        policy.check_data(data, data_sha256)
    rows = manifest.select_split(manifest.read_manifest(data), _SPLIT)
    labels, groups = np.array(rows["label"].to_pylist()), rows["group"].to_pylist()
    after = load_bundle(store.uri(name, version))
    check_symptom(after.spec, data_spec, data)
    candidate = _answers(after, rows, labels, options, executor)
    evidence, reference = None, None
    if promoted is not None:
        before = load_bundle(store.uri(name, promoted))
        reference = _answers(before, rows, labels, options, executor)
        evidence = Evidence(
            against=promoted,
            against_model=before.spec.model_version,
            data=data,
            data_sha256=data_sha256,
            same_data=data_sha256 in (after.spec.training.data_sha256, *after.spec.training.extends),
            comparison=noninferiority.compare(
                labels, reference, candidate, groups, after.spec.conformal.coverage, max_drop
            ),
        )
    decision = None
    if policy:
        columns = {column: rows[column].to_pylist() for column in subgroups.SLICED_BY}
        decision = policy.decide(labels, candidate, reference, groups, columns, data_sha256)
    return evidence, decision


def _answers(
    bundle: Bundle, rows: pa.Table, labels: np.ndarray, options: ModelOptions, executor: Executor | None
) -> Answers:
    columns, _ = collect_columns(bundle, rows, options, executor)
    return make_answers(columns, labels, bundle.spec)[2]
