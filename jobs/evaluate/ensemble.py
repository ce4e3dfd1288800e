"""A student compared with its teachers, the models of cross-validation: their ensemble, and each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.growth import wait_for_node
from jobs.common.console import console
from jobs.common.executor import Executor
from jobs.common.images import Columns, LoadImages, gather_columns, select_locations
from jobs.common.inference import AddLogits, Computation, ModelOptions, infer, resolve
from jobs.evaluate.driver import default_executor, make_answers
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.contract import BundleSpec
from scalp_core.evaluation import bootstrap, paired
from scalp_core.inference import calibration
from scalp_core.inference.predictor import needed_part

STUDENT, ENSEMBLE, MEAN = "student", "ensemble", "mean of the folds"


def compare_with_ensemble(
    student: Bundle,
    teachers: Sequence[Bundle],
    decision: BundleSpec,
    rows: pa.Table,
    options: ModelOptions = ModelOptions(),  # noqa: B008
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Grade labeled images by a student and its teachers, and compare the answers image by image.

    The ensemble averages the probabilities of the teachers, calibrated by `decision`, at the cost of all of
    them. Each teacher alone answers by its own decision, at the cost of one.

    Args:
        student: Bundle of the student, whose gates also refer images of the ensemble.
        teachers: Bundles of the folds, with the preprocessing of the student.
        decision: Calibration, grade sets and referral rule that were fitted on all out-of-fold answers.
        rows: Rows of the manifest that no model was trained on.
        options: Device, precision and runtime of the models.
        executor: Runs the steps; default: Ray.

    Returns:
        `images`, `groups`, `resamples`, `seed` and `level`; `models`: metrics of `paired.METRICS` with
        `value`, `low` and `high`, of the student, the ensemble, and the mean of the metrics of the folds;
        `differences`: student minus the other two, as in `paired.compare_answers`.
    """
    labels, groups = np.array(rows["label"].to_pylist()), rows["group"].to_pylist()
    bundles = [student, *teachers]
    columns = _collect_logits(bundles, rows, options, executor or default_executor())
    by_model = columns.pop("logits")

    def answers_of(logits: np.ndarray, spec: BundleSpec) -> paired.Answers:
        return make_answers(columns | {"logits": logits}, labels, spec)[2]

    answers = [answers_of(by_model[:, place], bundle.spec) for place, bundle in enumerate(bundles)]
    mean = calibration.mean_logits(by_model[:, 1:].swapaxes(0, 1), decision)
    answers.insert(1, answers_of(mean, decision.model_copy(update={"gates": student.spec.gates})))

    (of_student, of_ensemble, *of_folds), count = paired.resample_answers(labels, answers, groups)
    values = {
        STUDENT: of_student,
        ENSEMBLE: of_ensemble,
        MEAN: {name: np.mean([each[name] for each in of_folds], axis=0) for name in paired.METRICS},
    }
    return {
        "images": len(labels),
        "groups": count,
        "resamples": bootstrap.RESAMPLES,
        "seed": bootstrap.SEED,
        "level": bootstrap.LEVEL,
        "models": {name: paired.summarize_values(drawn, count) for name, drawn in values.items()},
        "differences": {
            name: paired.compare_values(values[name], of_student, count) for name in (ENSEMBLE, MEAN)
        },
    }


class AddLogitsOfAll:
    """Actor that replaces `image` by `logits` float32 (M, 4) of M models with the same preprocessing."""

    def __init__(
        self,
        bundles: Callable[[], list[Bundle]],
        computation: Computation,
        options: ModelOptions,
        threads: int,
    ) -> None:
        self._models = [
            AddLogits(partial(_return, bundle), computation, options, threads) for bundle in bundles()
        ]

    def __call__(self, batch: Columns) -> Columns:
        answers = [model(dict(batch)) for model in self._models]
        return answers[0] | {"logits": np.stack([answer["logits"] for answer in answers], axis=1)}


def _return(bundle: Bundle) -> Bundle:
    return bundle


def _collect_logits(
    bundles: Sequence[Bundle], rows: pa.Table, options: ModelOptions, executor: Executor
) -> Columns:
    """Read and decode each image once, and run all models on it: `logits` (N, M, 4), `statistics` (N, K)."""
    cluster = wait_for_node(executor.cluster(), console.print)
    computation = resolve(options, cluster, rows.num_rows, executor)
    device = computation.device
    for bundle in bundles:
        bundle.fetch(needed_part(device, computation.precision, computation.runtime))
    threads = 1 if device == "cuda" else cluster.model_cpus
    arguments = (executor.share(list(bundles)), computation, options, threads)
    located, load = select_locations(rows, "image_id"), LoadImages(bundles[0].spec.preprocess)
    batches = infer(located, load, AddLogitsOfAll, arguments, device, options.batch_size, cluster, executor)
    return gather_columns(batches, rows["image_id"].to_pylist())
