"""Print an evaluation: metrics with intervals, baselines, the linear probe, subgroups."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from jobs.common.console import console, show
from scalp_core.evaluation import bootstrap, subgroups
from scalp_core.grades import GRADE_NAMES

# Names in the summary and labels in the table.
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
    "ece_if_calibrated_95": "  its 95th percentile",
}


def show_evaluation(summary: dict[str, Any], title: str) -> None:
    scores, bounds = summary["metrics"], summary["intervals"]
    baselines = {"majority grade": summary["majority"], "prior": summary["prior"]}
    if probed := summary["linear_probe"]["metrics"]:
        baselines["linear probe"] = probed
    header = f"95 %, {bounds['groups']} groups"
    table = Table("", "this model", header, *baselines, title=title, title_justify="left")
    for name, label in _SCALARS.items():
        values = [_number(baseline.get(name)) for baseline in baselines.values()]
        table.add_row(label, _number(scores[name]), _bounds(bounds.get(name)), *values)
    for grade, word in enumerate(GRADE_NAMES):
        for name in ("recall", "precision"):
            values = [_number(baseline[name][grade]) for baseline in baselines.values()]
            interval = _bounds(bounds[name][grade])
            table.add_row(f"{name} {word}", _number(scores[name][grade]), interval, *values)
    console.print(table)
    if bounds["groups"] < bootstrap.FEW_GROUPS:
        console.print(f"only {bounds['groups']} groups: the intervals are too narrow")
    show("further metrics", _further_metrics(summary))
    _show_other_symptoms(summary["other_symptoms"])
    _show_slices(summary["slices"])
    console.print(summary["paper"]["note"])


def _further_metrics(summary: dict[str, Any]) -> dict[str, str]:
    grade_sets, bounds, curve = summary["conformal"], summary["intervals"], summary["risk_coverage"]
    point, calibrated = curve["referral"], summary["calibration"]
    by_grade = zip(GRADE_NAMES, grade_sets["by_grade"], strict=True)
    rows = {
        "grade sets with the label": f"{grade_sets['coverage']:.3f} {_bounds(bounds['coverage'])}, "
        f"promised {grade_sets['promised']:.3f}"
        + (f", fitted on {grade_sets['fitted_groups']} groups" if grade_sets["fitted_groups"] else ""),
        "  by grade": ", ".join(f"{name} {_number(of_grade['coverage'])}" for name, of_grade in by_grade),
        "  mean size": f"{grade_sets['mean_set_size']:.2f}",
        "referred to a person": f"{summary['referred']:.1%}",
        "  wrong among the others": f"{_number(point['error'])} "
        f"(of all {1 - summary['metrics']['top1']:.3f})",
        **{
            f"  {target['kind']}, target {target['limit']:.4g}": _number(target["share"])
            for target in summary["targets"]
        },
        "area under the risk-coverage curve": f"{curve['aurc']:.3f}, in grades {curve['aurc_mae']:.3f}",
        "ECE before temperature": subgroups.ece_line(calibrated, "before"),
        "ECE after temperature": subgroups.ece_line(calibrated, "after"),
        "the paper's binary accuracy": _number(summary["paper"]["binary_accuracy"]),
        "linear probe": _describe_probe(summary["linear_probe"]),
        "computed by": summary["computed_by"],
        "data": summary["trained_on"]["note"],
    }
    if tta := summary["tta"]:
        without = tta["metrics_without"]
        rows[f"TTA, mean of {tta['passes']} passes"] = (
            f"{tta['photographs_per_second']} images/s in the model, without it "
            f"{tta['photographs_per_second_without']}, kappa {_number(without['qwk'])} and "
            f"log loss {_number(without['log_loss'])}; {tta['note']}"
        )
    return rows


def _describe_probe(probed: dict[str, Any]) -> str:
    if probed["metrics"] is None:
        return f"omitted: {probed['note']}"
    return (
        f"logistic regression on features of the initial weights ({probed['initial_weights']}), from "
        f"{probed['images']:,} of {probed['of']:,} training images; took {probed['seconds']} s"
    )


def _show_other_symptoms(scores: dict[str, Any]) -> None:
    if not scores:
        return
    table = Table("symptom", "images", "kappa", "95 %", "top-1", "mean error", title="other symptoms",
                  title_justify="left")  # fmt: skip
    for name, score in scores.items():
        values = [_number(score[key]) for key in ("qwk", "top1", "mae")]
        bound = _bounds(score["intervals"]["qwk"])
        table.add_row(name.replace("_", " "), f"{score['n']:,}", values[0], bound, *values[1:])
    console.print(table)


def _show_slices(slices: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("slice", "n", "groups", "kappa", "95 %", "top-1", "mean error", title="slices",
                  title_justify="left")  # fmt: skip
    for column, column_slices in slices.items():
        for row in column_slices:
            name = f"{column} {row['value']}" + " (small)" * row["small"]
            values = [_number(row[key]) for key in ("qwk", "top1", "mae")]
            bound = _bounds(row["intervals"]["qwk"])
            table.add_row(name, f"{row['n']:,}", f"{row['groups']:,}", values[0], bound, *values[1:])
    console.print(table)


def _number(value: float | None) -> str:
    # Adding 0.0 turns a negative zero into a positive one.
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _bounds(bound: dict[str, Any] | None) -> str:
    if bound is None:
        return "-"
    return f"{bound['low']:.3f} to {bound['high']:.3f}" + "*" * bool(bound["undefined"])
