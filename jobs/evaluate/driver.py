"""The driver of `scalp evaluate`: metrics of a bundle on one split, each image exactly once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from joblib import cpu_count

from cluster.growth import wait_for_node
from jobs.common.console import SUMMARY_FILE, console, now, write_json
from jobs.common.executor import Executor, needs_ray
from jobs.common.images import Columns, gather_columns, select_locations
from jobs.common.inference import Computation, ModelOptions, resolve, tta_symmetries, with_logits
from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.console import show_evaluation
from jobs.evaluate.probe import evaluate_probe, omit_probe
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.datasets.other_symptoms import OTHER_LABELS, add_other_labels, other_symptoms, symptom_id
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, figures, metrics, subgroups, targets
from scalp_core.evaluation.paired import Answers
from scalp_core.grades import SYMPTOM_IDS, SYMPTOMS, name_symptom
from scalp_core.inference import calibration
from scalp_core.inference.decision import Grading, make_gradings, other_answers
from scalp_core.reports.data import leak_warning
from scalp_core.reports.page import Text, text
from scalp_core.storage import outputs, parquet

KIND = "evaluate"
SEEN = {
    "calibration": "SEEN IN CALIBRATION: scalp calibrate used these data; metrics may be too optimistic",
    "train": "SEEN IN TRAINING: the model was trained on this split; metrics are too optimistic",
    "val": "SEEN IN TRAINING: epoch, temperature and grade sets were chosen on this split; metrics are too "
    "optimistic",
}
"""Warnings about images that the model has seen, by the use."""
_TTA_NOTE = "temperature, grade sets and referral rule were fitted without TTA"


def collect_columns(
    bundle: Bundle, rows: pa.Table, options: ModelOptions, executor: Executor | None = None
) -> tuple[Columns, Computation]:
    """Run inference for the rows of a manifest, and return its columns in their order.

    Returns:
        The columns, such as `logits` float32 (N, 4), and the computation that produced them.

    Raises:
        UserError: An image is unreadable, so that a metric of all rows is impossible; or a machine of the
            cluster would compute other answers than the rest.
    """
    wanted = rows["image_id"].to_pylist()
    executor = executor or default_executor()
    cluster = wait_for_node(executor.cluster(), console.print)
    computation = resolve(options, cluster, len(wanted), executor)
    located = select_locations(rows, "image_id")
    batches = with_logits(located, bundle, computation, options, cluster, executor)
    return gather_columns(batches, wanted), computation


def default_executor() -> Executor:
    """Return the executor that runs the steps: this process, or Ray if it runs or this machine has a GPU."""
    if not needs_ray():
        return LocalExecutor(cpu_count())
    from jobs.common.ray_executor import RayExecutor  # slow to import

    return RayExecutor()


def collect_finite_columns(
    bundle: Bundle, rows: pa.Table, options: ModelOptions, executor: Executor | None = None
) -> tuple[Columns, Computation]:
    """Run inference for the rows of a manifest, as `collect_columns`, to fit a decision on them.

    Raises:
        UserError: As in `collect_columns`, or a logit is not finite, so that calibration is impossible.
    """
    columns, computation = collect_columns(bundle, rows, options, executor)
    finite = calibration.finite_rows(columns["logits"])
    if not finite.all():
        raise UserError(
            f"{bundle.spec.name} gives logits that are not finite for {(~finite).sum()} of {len(finite)} "
            "images; train again with a smaller learning_rate, or check the machine"
        )
    return columns, computation


def evaluate(
    bundle: str,
    data: str,
    out: str,
    split: str = "test",
    options: ModelOptions = ModelOptions(),  # noqa: B008
    executor: Executor | None = None,
    probe: bool = True,
) -> dict[str, Any]:
    """Evaluate a bundle on a split of prepared data.

    Args:
        bundle: Directory of the bundle.
        data: Directory that `scalp prepare` wrote.
        out: Output directory for `summary.json`, `predictions.parquet` and the plots `confusion.png`,
            `reliability.png`, `risk_coverage.png` and `slices.png`.
        split: train, val or test.
        options: Device, precision and runtime of the model.
        executor: Runs the steps; default: Ray.
        probe: Whether to compute the linear probe, a baseline.

    Returns:
        The summary.

    Raises:
        UserError: Invalid input, or `out` overlaps with `data`, holds other files, or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [data])
    loaded, data_spec = load_bundle(bundle), manifest.read_spec(data)
    table = read_table(loaded.spec, data_spec, data)
    manifest.select_split(table, split)  # an empty split is an error before OUT is claimed
    with outputs.open_output(out, KIND, [data]):
        evaluation = evaluate_table(loaded, data_spec, table, split, options, out, executor, probe)
    summary = evaluation.summary
    show_evaluation(summary, evaluation.title.replace("\n", " on ", 1).replace("\n", ", "))
    for warning in summary["warnings"]:
        console.print(warning)
    console.print(f"plots, predictions and {SUMMARY_FILE}: {out}")
    return summary


class Evaluation(NamedTuple):
    """An evaluated model: summary, title of its plots, answers in the order of the rows, warnings."""

    summary: dict[str, Any]
    title: str
    answers: Answers
    warnings: list[Text]


def read_table(spec: BundleSpec, data_spec: DataSpec, data: str) -> pa.Table:
    """Read the manifest of prepared data; for a bundle of a fold of these data, val is that fold.

    Raises:
        UserError: As in `check_symptom`.
    """
    check_symptom(spec, data_spec, data)
    table = manifest.read_manifest(data)
    if spec.training.fold is not None and spec.training.data_sha256 == data_spec.sha256:
        table = manifest.apply_fold(table, spec.training.fold)
    return table


def check_symptom(spec: BundleSpec, data_spec: DataSpec, data: str) -> None:
    """Refuse labels of another symptom than the grades of a bundle.

    Bundles of version 1, and data of class folders or older tables, do not state theirs.

    Raises:
        UserError: The symptoms differ.
    """
    if spec.schema_version == 1 or data_spec.symptom is None:
        return
    labeled = symptom_id(data_spec.symptom)
    if labeled != spec.symptom:
        expected = SYMPTOMS[SYMPTOM_IDS.index(spec.symptom)]
        raise UserError(
            f"{data} has labels of {name_symptom(labeled)}, and the grades of {spec.name} are of "
            f"{name_symptom(spec.symptom)}; give data prepared with --symptom {expected}"
        )


def evaluate_table(
    loaded: Bundle,
    data_spec: DataSpec,
    table: pa.Table,
    split: str,
    options: ModelOptions,
    out: str,
    executor: Executor | None,
    probe: bool,
) -> Evaluation:
    """Grade a split of a manifest, compute its metrics and baselines, and write the output files to `out`."""
    rows, executor = manifest.select_split(table, split), executor or default_executor()
    columns, computation = collect_columns(loaded, rows, options, executor)
    labels = np.array(rows["label"].to_pylist())
    gradings, probs, answers = make_answers(columns, labels, loaded.spec)
    version = loaded.spec.version_in(computation.precision)
    summary = {
        "kind": "evaluate",
        "date": now(),
        "model_version": version,
        "computed_by": computation.computed_by,
        "computation": asdict(computation),
        "data_sha256": data_spec.sha256,
        "synthetic": data_spec.synthetic or loaded.spec.training.synthetic,
        "split": split,
        "split_method": data_spec.split.method,
        "leaky": data_spec.split.leaky,
        "leaking_pairs": data_spec.split.leaking_pairs,
        "trained_on": _trained_on(loaded.spec, data_spec, split),
        "groups": len(set(rows["group"].to_pylist())),
        **_compute_metrics(rows, columns, gradings, probs, answers, loaded.spec),
        "other_symptoms": _score_other_symptoms(rows, columns, loaded.spec, data_spec),
    }
    summary["linear_probe"] = (
        evaluate_probe(loaded, data_spec, table, split, computation, options.batch_size, executor)
        if probe
        else omit_probe("--no-probe")
    )
    warnings = _warnings(summary, loaded.spec, data_spec)
    summary["warnings"] = list(map(str, warnings))
    description = f"{split}: {len(labels)} images, {computation.device} {computation.precision}"
    flags = ["LEAKY SPLIT"] * data_spec.split.leaky + ["SYNTHETIC IMAGES"] * summary["synthetic"]
    title = "\n".join(filter(None, [version, description + ", TTA" * options.tta, ", ".join(flags)]))
    _write(out, summary, rows, gradings, title)
    return Evaluation(summary, title, answers, warnings)


def make_answers(
    columns: Columns, labels: np.ndarray, spec: BundleSpec
) -> tuple[list[Grading], np.ndarray, Answers]:
    """Make a model's answers from its logits.

    Returns:
        The gradings; the probabilities (N, 4) to score, in which scores that are not finite count as the
        largest error; and the answers to compare with those of other models.
    """
    gradings = make_gradings(columns["logits"], columns["statistics"], spec)
    probs = subgroups.penalize_not_finite(
        labels,
        np.array([grading.probabilities for grading in gradings]),
        calibration.finite_rows(columns["logits"]),
    )
    covered = subgroups.is_in_set(labels, [grading.grade_set for grading in gradings])
    refer = np.array([grading.refer for grading in gradings])
    return gradings, probs, Answers(probs.argmax(axis=1), covered, refer)


def _warnings(summary: dict[str, Any], spec: BundleSpec, data: DataSpec) -> list[Text]:
    """List the reasons to doubt the metrics, one line each."""
    lines = []
    if spec.warning:
        lines.append(text("the model was {warning}", warning=text(spec.warning)))
    if data.warning:
        lines.append(text(data.warning))
    if seen := summary["trained_on"]["warning"]:
        lines.append(text(seen))
    if leak := leak_warning(data.split):
        lines.append(leak)
    if bad := summary["not_finite"]:
        lines.append(
            text(
                "NOT FINITE: the logits of {count} images are not finite; each counts as the largest error "
                "that its label allows",
                count=bad,
            )
        )
    return lines


def _trained_on(spec: BundleSpec, data: DataSpec, split: str) -> dict[str, Any]:
    """Compare the data hashes of the bundle and the evaluation, and warn if training used the split."""
    same = spec.training.data_sha256 == data.sha256
    warning = None
    if spec.calibrated_on and spec.calibrated_on.data_sha256 == data.sha256:
        warning = SEEN["calibration"]
    if same and split == "train":
        warning = SEEN["train"]
    elif same and split == "val":
        warning = SEEN["val"]
    return {
        "same_data": same,
        "warning": warning,
        "note": "the data and splits of the training"
        if same
        else "other data than those of the training; hashes do not show whether the training data contained "
        "some of these images",
    }


def _compute_metrics(
    rows: pa.Table,
    columns: Columns,
    gradings: list[Grading],
    probs: np.ndarray,
    answers: Answers,
    spec: BundleSpec,
) -> dict[str, Any]:
    labels, grades, refer = np.array(rows["label"].to_pylist()), answers.grades, answers.refer
    finite = calibration.finite_rows(columns["logits"])
    sets, groups = [grading.grade_set for grading in gradings], rows["group"].to_pylist()
    grade_sets = subgroups.measure_grade_sets(labels, sets, spec.conformal.coverage) | {
        "fitted_groups": spec.conformal.groups,
        "fitted_groups_by_grade": spec.conformal.grade_groups,
    }
    extra = {
        "coverage": answers.covered.astype(float),
        "referred": refer.astype(float),
        "mean_set_size": np.array([float(len(grades_in_set)) for grades_in_set in sets]),
    }
    tta = "plain_logits" in columns
    uncalibrated = calibration.probabilities(columns["logits"], 1.0)
    before = None if tta else subgroups.penalize_not_finite(labels, uncalibrated, finite)
    slice_columns = {name: rows[name].to_pylist() for name in subgroups.SLICED_BY}
    return {
        "metrics": metrics.score(labels, grades) | metrics.score_probabilities(labels, probs),
        "intervals": bootstrap.bootstrap_metrics(labels, probs, groups, extra),
        "majority": metrics.majority_baseline(labels, spec.majority_grade),
        "prior": metrics.prior_baseline(labels, spec.training.grade_counts),
        "paper": {
            "binary_accuracy": metrics.binary_accuracy(labels, probs),
            "note": metrics.PAPER_NOTE,
        },
        "coverage": grade_sets["coverage"],
        "conformal": grade_sets,
        "referred": float(refer.mean()),
        "not_finite": int((~finite).sum()),
        "risk_coverage": subgroups.measure_risk_coverage(labels, probs, refer),
        "targets": [
            {"kind": target.kind, "limit": target.limit}
            | {"share": targets.measure_share(target.kind, labels, grades, refer)}
            for target in spec.referral.targets or ()
        ],
        "calibration": subgroups.measure_calibration(labels, probs, before),
        "slices": subgroups.score_slices(labels, grades, groups, slice_columns),
        "tta": _compare_tta(labels, columns, spec) if tta else None,
    }


def _score_other_symptoms(
    rows: pa.Table, columns: Columns, spec: BundleSpec, data_spec: DataSpec
) -> dict[str, Any]:
    """Compute the metrics of the other symptoms that the bundle grades, on the images with labels of them."""
    if not spec.other_symptoms:
        return {}
    labels = np.array(add_other_labels(rows, data_spec.symptom)[OTHER_LABELS].to_pylist())
    answers = {name: grades for name, (grades, _) in other_answers(columns["other_logits"], spec).items()}
    names = other_symptoms(data_spec.symptom)
    return subgroups.score_other_symptoms(names, labels, answers, rows["group"].to_pylist())


def _compare_tta(labels: np.ndarray, columns: Columns, spec: BundleSpec) -> dict[str, Any]:
    """Compare test-time augmentation with a single pass; rates are of forward passes, without reading."""
    finite = calibration.finite_rows(columns["plain_logits"])
    plain = calibration.calibrated(columns["plain_logits"], spec)
    plain = subgroups.penalize_not_finite(labels, plain, finite)
    return {
        "passes": len(tta_symmetries(spec.preprocess)),
        "photographs_per_second": round(len(labels) / float(columns["seconds"].sum()), 1),
        "photographs_per_second_without": round(len(labels) / float(columns["plain_seconds"].sum()), 1),
        "metrics_without": metrics.score(labels, plain.argmax(axis=1))
        | metrics.score_probabilities(labels, plain),
        "note": _TTA_NOTE,
    }


def _write(out: str, summary: dict[str, Any], rows: pa.Table, gradings: list[Grading], title: str) -> None:
    scores, bounds, calibrated = summary["metrics"], summary["intervals"], summary["calibration"]
    note = (
        f"top-1 {scores['top1']:.3f}; the paper's binary accuracy {summary['paper']['binary_accuracy']:.3f}"
    )
    plots = {
        "confusion.png": figures.plot_confusion_matrix(scores["confusion"], title, note),
        "reliability.png": figures.plot_reliability(calibrated, title),
        "risk_coverage.png": figures.plot_risk_coverage(summary["risk_coverage"], title),
        "slices.png": figures.plot_slices(summary["slices"], scores, bounds, title),
    }
    for name, plot in plots.items():
        storage.write(storage.join(out, name), plot)
    columns = {
        "grade": pa.array([g.grade for g in gradings], pa.int8()),
        "probabilities": pa.array([g.probabilities for g in gradings]),
        "grade_set": pa.array([g.grade_set for g in gradings], pa.list_(pa.int8())),
        "refer": pa.array([g.refer for g in gradings]),
        "refer_reasons": pa.array([g.refer_reasons for g in gradings], pa.list_(pa.string())),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    parquet.write(storage.join(out, "predictions.parquet"), rows)
    write_json(storage.join(out, SUMMARY_FILE), summary)
