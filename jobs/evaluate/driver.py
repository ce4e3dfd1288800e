"""`scalp evaluate`: a bundle on one part of the prepared data, every photograph exactly once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from cluster.growth import wait_for_node
from jobs.common.console import SUMMARY_FILE, console, now, show, write_json
from jobs.common.executor import RayExecutor
from jobs.common.images import Columns, check_read, make_dataset, select_locations
from jobs.common.inference import Computation, ModelOptions, resolve, tta_symmetries, with_logits
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle, BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, figures, metrics, subgroups
from scalp_core.grades import GRADE_NAMES
from scalp_core.inference import calibration
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.storage import outputs, parquet

KIND = "evaluate"
# Names in the summary, and words in the table.
_SCALARS = {
    "qwk": "quadratic weighted kappa",
    "top1": "top-1 accuracy",
    "within1": "within one grade",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "mae": "mean absolute error",
    "mae_macro": "  mean over grades",
    "auroc": "AUROC, moderate or worse",
    "sensitivity_at_95_specificity": "  sensitivity at 95 % specificity",
    "rps": "ranked probability score",
    "log_loss": "log loss",
    "ece": "calibration error (ECE)",
    "ece_if_calibrated": "  expected if perfectly calibrated",
    "ece_if_calibrated_95": "  95 % of such up to",
}
_TTA_NOTE = "the temperature, the sets and the referral rule were fitted without it"


def collect(bundle: Bundle, rows: pa.Table, options: ModelOptions) -> tuple[Columns, Computation]:
    """What the pipeline leaves for the rows of a manifest, in their order: `logits` float32 (N, 4), ….

    Returns:
        the columns, and what computed them.

    Raises:
        UserError: a photograph cannot be read: a number for a part of the rows is not what was asked for; a
            machine of the cluster would answer otherwise than the others.
    """
    wanted = rows["image_id"].to_pylist()
    batches: list[Columns] = []
    executor = RayExecutor()
    cluster = wait_for_node(executor.cluster(), console.print)
    computation = resolve(options, cluster, len(wanted), executor)
    dataset = make_dataset(select_locations(rows, "image_id"))
    for batch in with_logits(dataset, bundle, computation, options, cluster, executor).iter_batches():
        check_read(batch)
        batches.append(batch)
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    place = {image_id: index for index, image_id in enumerate(found["image_id"])}
    if len(found["image_id"]) != len(wanted) or set(place) != set(wanted):
        raise RuntimeError(f"{len(found['image_id'])} answers for {len(wanted)} photographs")
    order = [place[image_id] for image_id in wanted]
    return {name: values[order] for name, values in found.items()}, computation


def collect_logits(bundle: Bundle, rows: pa.Table, options: ModelOptions) -> tuple[np.ndarray, Computation]:
    """Logits float32 (N, 4) of the rows of a manifest, in their order, and what computed them.

    Raises:
        UserError: as `collect`, or a logit is not finite: nothing can be fitted to such scores.
    """
    found, computation = collect(bundle, rows, options)
    logits = found["logits"]
    if bad := int((~calibration.finite_rows(logits)).sum()):
        raise UserError(
            f"{bad} of {len(logits)} images got scores that are not finite from {bundle.spec.name}; train "
            "again with a smaller learning_rate, or check the machine"
        )
    return logits, computation


def evaluate(
    bundle: str,
    data: str,
    out: str,
    split: str = "test",
    options: ModelOptions = ModelOptions(),  # noqa: B008
) -> dict[str, Any]:
    """Scores a bundle.

    Args:
        bundle: directory of the bundle.
        data: directory that `scalp prepare` wrote.
        out: directory for `summary.json`, `predictions.parquet` and the pictures `confusion.png`,
            `reliability.png`, `risk_coverage.png` and `slices.png`.
        split: train, val or test.
        options: how the model runs.

    Returns:
        the summary.

    Raises:
        UserError: bad input, or `out` overlaps with `data`, holds something else, or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [data])
    loaded = load_bundle(bundle)
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if loaded.spec.training.fold is not None and loaded.spec.training.data_sha256 == data_spec.sha256:
        table = manifest.apply_fold(table, loaded.spec.training.fold)
    rows = manifest.select_split(table, split)
    with outputs.open_output(out, KIND, [data]):
        summary, title = _scored(loaded, data_spec, rows, split, options, out)
    _show(summary, title.replace("\n", " on ", 1).replace("\n", ", "))
    for warning in summary["warnings"]:
        console.print(warning)
    console.print(f"pictures, predictions and {SUMMARY_FILE}: {out}")
    return summary


def _scored(
    loaded: Bundle,
    data_spec: DataSpec,
    rows: pa.Table,
    split: str,
    options: ModelOptions,
    out: str,
) -> tuple[dict[str, Any], str]:
    """Grades the rows and writes what came out; the summary and its title."""
    found, computation = collect(loaded, rows, options)
    answers = make_gradings(found["logits"], found["statistics"], loaded.spec)
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
        **_assessed(rows, found, answers, loaded.spec),
    }
    summary["warnings"] = _warnings(summary, loaded.spec, data_spec)
    shown = f"{split}: {len(answers)} photographs, {computation.device} {computation.precision}"
    flags = ["LEAKY SPLIT"] * data_spec.split.leaky + ["SYNTHETIC IMAGES"] * summary["synthetic"]
    title = "\n".join(filter(None, [version, shown + ", TTA" * options.tta, ", ".join(flags)]))
    _write(out, summary, rows, answers, title)
    return summary, title


def _warnings(summary: dict[str, Any], spec: BundleSpec, data: DataSpec) -> list[str]:
    """Reasons to doubt the metrics, one line each."""
    bad = summary["not_finite"]
    found = [
        f"the model was {spec.warning}" if spec.warning else None,
        data.warning,
        summary["trained_on"]["warning"],
        data.split.warning,
        f"NOT FINITE: the scores of {bad} images are not finite numbers; each counts as the largest error "
        "that its label allows"
        if bad
        else None,
    ]
    return [warning for warning in found if warning]


def _trained_on(spec: BundleSpec, data: DataSpec, split: str) -> dict[str, Any]:
    """What hashes can tell of whether the bundle has seen these photographs, and what they cannot."""
    same = spec.training.data_sha256 == data.sha256
    warning = None
    if same and split == "train":
        warning = "SEEN IN TRAINING: the model learned from this part; the figures flatter"
    elif same and split == "val":
        warning = "SEEN IN TRAINING: this part chose the epoch, temperature and sets; the figures flatter"
    return {
        "same_data": same,
        "warning": warning,
        "note": "the data and the parts the bundle was trained with"
        if same
        else "other data than the bundle was trained with; hashes cannot tell whether it saw some of these "
        "photographs in another preparation",
    }


def _assessed(rows: pa.Table, found: Columns, answers: list[Grading], spec: BundleSpec) -> dict[str, Any]:
    labels = np.array(rows["label"].to_pylist())
    finite = calibration.finite_rows(found["logits"])
    probs = subgroups.penalize_not_finite(
        labels, np.array([answer.probabilities for answer in answers]), finite
    )
    grades = probs.argmax(axis=1)
    refer = np.array([answer.refer for answer in answers])
    sets, groups = [answer.grade_set for answer in answers], rows["group"].to_pylist()
    told_sets = subgroups.measure_grade_sets(labels, sets, spec.conformal.coverage)
    extra = {
        "coverage": subgroups.is_in_set(labels, sets).astype(float),
        "referred": refer.astype(float),
        "mean_set_size": np.array([float(len(each)) for each in sets]),
    }
    tta = "plain_logits" in found
    uncalibrated = calibration.probabilities(found["logits"], 1.0)
    before = None if tta else subgroups.penalize_not_finite(labels, uncalibrated, finite)
    columns = {name: rows[name].to_pylist() for name in subgroups.SLICED_BY}
    return {
        "metrics": metrics.score(labels, grades) | metrics.score_probabilities(labels, probs),
        "intervals": bootstrap.bootstrap_metrics(labels, probs, groups, extra),
        "majority": metrics.majority_baseline(labels, spec.majority_grade),
        "prior": metrics.prior_baseline(labels, spec.training.grade_counts),
        "paper": {
            "binary_accuracy": metrics.binary_accuracy(labels, probs),
            "note": metrics.PAPER_NOTE,
        },
        "coverage": told_sets["coverage"],
        "conformal": told_sets,
        "referred": float(refer.mean()),
        "not_finite": int((~finite).sum()),
        "risk_coverage": subgroups.measure_risk_coverage(labels, probs, refer),
        "calibration": subgroups.measure_calibration(labels, probs, before),
        "slices": subgroups.score_slices(labels, grades, groups, columns),
        "tta": _tta(labels, found, spec) if tta else None,
    }


def _tta(labels: np.ndarray, found: Columns, spec: BundleSpec) -> dict[str, Any]:
    """What averaging costs and changes: rates are of the forward passes of one model, not of reading."""
    finite = calibration.finite_rows(found["plain_logits"])
    plain = calibration.probabilities(found["plain_logits"], spec.temperature)
    plain = subgroups.penalize_not_finite(labels, plain, finite)
    return {
        "passes": len(tta_symmetries(spec.preprocess)),
        "photographs_per_second": round(len(labels) / float(found["seconds"].sum()), 1),
        "photographs_per_second_without": round(len(labels) / float(found["plain_seconds"].sum()), 1),
        "metrics_without": metrics.score(labels, plain.argmax(axis=1))
        | metrics.score_probabilities(labels, plain),
        "note": _TTA_NOTE,
    }


def _write(out: str, summary: dict[str, Any], rows: pa.Table, answers: list[Grading], title: str) -> None:
    scored, bounds, told = summary["metrics"], summary["intervals"], summary["calibration"]
    note = (
        f"top-1 {scored['top1']:.3f}; the paper's binary accuracy {summary['paper']['binary_accuracy']:.3f}"
    )
    pictures = {
        "confusion.png": figures.plot_confusion_matrix(scored["confusion"], title, note),
        "reliability.png": figures.plot_reliability(told, title),
        "risk_coverage.png": figures.plot_risk_coverage(summary["risk_coverage"], title),
        "slices.png": figures.plot_slices(summary["slices"], scored, bounds, title),
    }
    for name, picture in pictures.items():
        storage.write(storage.join(out, name), picture)
    columns = {
        "grade": pa.array([a.grade for a in answers], pa.int8()),
        "probabilities": pa.array([a.probabilities for a in answers]),
        "grade_set": pa.array([a.grade_set for a in answers], pa.list_(pa.int8())),
        "refer": pa.array([a.refer for a in answers]),
        "refer_reasons": pa.array([a.refer_reasons for a in answers], pa.list_(pa.string())),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    parquet.write(storage.join(out, "predictions.parquet"), rows)
    write_json(storage.join(out, SUMMARY_FILE), summary)


def _show(summary: dict[str, Any], title: str) -> None:
    own, bounds, prior, majority = (summary[name] for name in ("metrics", "intervals", "prior", "majority"))
    header = f"95 %, {bounds['groups']} groups"
    table = Table("", "this model", header, "majority grade", "prior", title=title, title_justify="left")
    for name, label in _SCALARS.items():
        table.add_row(
            label,
            _number(own[name]),
            _bounds(bounds.get(name)),
            _number(majority.get(name)),
            _number(prior[name]),
        )
    for grade, word in enumerate(GRADE_NAMES):
        for name in ("recall", "precision"):
            values = [_number(each[name][grade]) for each in (own, majority, prior)]
            table.add_row(f"{name} {word}", values[0], _bounds(bounds[name][grade]), *values[1:])
    console.print(table)
    if bounds["groups"] < bootstrap.FEW_GROUPS:
        console.print(f"of {bounds['groups']} groups only: the intervals are too narrow")
    show("beside it", _beside(summary))
    _show_slices(summary["slices"])
    console.print(summary["paper"]["note"])


def _beside(summary: dict[str, Any]) -> dict[str, str]:
    told, bounds, curve = summary["conformal"], summary["intervals"], summary["risk_coverage"]
    point, calibrated = curve["referral"], summary["calibration"]
    by_grade = zip(GRADE_NAMES, told["by_grade"], strict=True)
    rows = {
        "sets that hold the label": f"{told['coverage']:.3f} {_bounds(bounds['coverage'])}, "
        f"promised {told['promised']:.2f}",
        "  by grade": ", ".join(f"{name} {_number(each['coverage'])}" for name, each in by_grade),
        "  mean size": f"{told['mean_set_size']:.2f}",
        "referred to a person": f"{summary['referred']:.1%}",
        "  wrong among the rest": f"{_number(point['error'])} (of all {1 - summary['metrics']['top1']:.3f})",
        "area under risk and coverage": f"{curve['aurc']:.3f}, in grades {curve['aurc_mae']:.3f}",
        "ECE before temperature": subgroups.ece_line(calibrated, "before"),
        "ECE after temperature": subgroups.ece_line(calibrated, "after"),
        "the paper's binary accuracy": _number(summary["paper"]["binary_accuracy"]),
        "computed by": summary["computed_by"],
        "data": summary["trained_on"]["note"],
    }
    if tta := summary["tta"]:
        without = tta["metrics_without"]
        rows[f"TTA, mean of {tta['passes']} passes"] = (
            f"{tta['photographs_per_second']} photographs/s in the model, without it "
            f"{tta['photographs_per_second_without']}, kappa {_number(without['qwk'])} and "
            f"log loss {_number(without['log_loss'])}; {tta['note']}"
        )
    return rows


def _show_slices(slices: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("slice", "n", "groups", "kappa", "95 %", "top-1", "mean error", title="slices",
                  title_justify="left")  # fmt: skip
    for column, found in slices.items():
        for row in found:
            name = f"{column} {row['value']}" + " (small)" * row["small"]
            values = [_number(row[key]) for key in ("qwk", "top1", "mae")]
            bound = _bounds(row["intervals"]["qwk"])
            table.add_row(name, f"{row['n']:,}", f"{row['groups']:,}", values[0], bound, *values[1:])
    console.print(table)


def _number(value: float | None) -> str:
    # The sum makes a positive zero of a negative one.
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _bounds(bound: dict[str, Any] | None) -> str:
    if bound is None:
        return "-"
    return f"{bound['low']:.3f} to {bound['high']:.3f}" + "*" * bool(bound["undefined"])
