"""`scalp evaluate A B …`: compare models on one split, image by image, with intervals of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from jobs.common.console import SUMMARY_FILE, console, now, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import KIND, evaluate_table, read_table
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, figures
from scalp_core.evaluation.paired import LOWER_IS_BETTER, METRICS, compare_answers
from scalp_core.reports import page
from scalp_core.reports.page import Text, text
from scalp_core.storage import outputs

_AXIS_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # a kappa is in -1..1


def evaluate_models(
    bundles: Sequence[str],
    data: str,
    out: str,
    split: str = "test",
    options: ModelOptions = ModelOptions(),  # noqa: B008
    executor: Executor | None = None,
    probe: bool = True,
) -> dict[str, Any]:
    """Evaluate several bundles on a split, and compare each later one with the first.

    Args:
        bundles: Directories of two or more bundles.
        data: Directory that `scalp prepare` wrote.
        out: Output directory for `summary.json`, `report.html` and `differences.png`; `out/model-1`, … get
            the files of an evaluation of each bundle.
        split: train, val or test.
        options: Device, precision and runtime of the models.
        executor: Runs the steps; default: Ray.
        probe: Whether to compute the linear probe of each run, a baseline.

    Returns:
        The summary: `models`, and `comparison` of `paired.compare_answers`.

    Raises:
        UserError: As in `evaluate`, or the bundles have different images in the split, as those of two folds.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [data])
    data_spec = manifest.read_spec(data)
    loaded = [load_bundle(bundle) for bundle in bundles]
    tables = [read_table(bundle.spec, data_spec, data) for bundle in loaded]
    rows, *others = (manifest.select_split(table, split) for table in tables)
    for uri, other in zip(bundles[1:], others, strict=True):
        if other["image_id"].to_pylist() != rows["image_id"].to_pylist():
            raise UserError(
                f"{uri} and {bundles[0]} are of different folds, so they have no {split} split in common; "
                "compare them with --split test"
            )
    with outputs.open_output(out, KIND, [data]):
        evaluations = []
        for number, (bundle, table) in enumerate(zip(loaded, tables, strict=True), 1):
            console.print(f"model {number} of {len(loaded)}: {bundle.spec.model_version}")
            folder = storage.join(out, f"model-{number}")
            evaluations.append(
                evaluate_table(bundle, data_spec, table, split, options, folder, executor, probe)
            )

        labels = np.array(rows["label"].to_pylist())
        answers = [evaluation.answers for evaluation in evaluations]
        summaries = [evaluation.summary for evaluation in evaluations]
        summary = {
            "kind": KIND,
            "date": now(),
            "data_sha256": data_spec.sha256,
            "split": split,
            "models": [
                {"bundle": uri, "folder": f"model-{number}", "model_version": of_model["model_version"]}
                for number, (uri, of_model) in enumerate(zip(bundles, summaries, strict=True), 1)
            ],
            "warnings": list(dict.fromkeys(line for of_model in summaries for line in of_model["warnings"])),
            "comparison": compare_answers(labels, answers, rows["group"].to_pylist()),
        }
        warnings = {str(line): line for evaluation in evaluations for line in evaluation.warnings}
        _write(out, summary, list(warnings.values()))
    _show(summary)
    console.print(f"report.html, {SUMMARY_FILE}, and plots and predictions per model: {out}")
    return summary


def _names(summary: Mapping[str, Any]) -> list[str]:
    return [model["model_version"] for model in summary["models"]]


def _conclusion(differences: Mapping[str, Mapping[str, Any]]) -> Text:
    """State for which metrics the interval of the difference contains 0."""
    different = [METRICS[name] for name, value in differences.items() if value["contains_zero"] is False]
    same = [METRICS[name] for name, value in differences.items() if value["contains_zero"]]
    sentences = []
    if same:
        sentences.append(
            text("Not shown to differ (the interval contains 0): {metrics}.", metrics=_listed(same))
        )
    if different:
        sentences.append(
            text("Different (the interval does not contain 0): {metrics}.", metrics=_listed(different))
        )
    return page.join(sentences or [text("No interval: one group, so nothing is shown.")], " ")


def _listed(labels: list[str]) -> Text:
    return page.join(map(text, labels), "; ")


def _write(out: str, summary: Mapping[str, Any], warnings: Sequence[Text]) -> None:
    comparison, names = summary["comparison"], _names(summary)
    title = f"{summary['split']}: {comparison['images']} images, {comparison['groups']} groups"
    plot = figures.plot_differences(comparison["differences"], names[1:], title)
    html = page.render(
        "comparison.html",
        models=names,
        comparison=comparison,
        split=summary["split"],
        warnings=warnings,
        metrics={name: text(label) for name, label in METRICS.items()},
        lower_is_better=LOWER_IS_BETTER,
        conclusions=[_conclusion(of_model) for of_model in comparison["differences"]],
        limit=_axis_limit(comparison["differences"]),
    )
    storage.write(storage.join(out, "differences.png"), plot)
    storage.write(storage.join(out, "report.html"), html)
    write_json(storage.join(out, SUMMARY_FILE), summary)


def _axis_limit(differences: Sequence[Mapping[str, Mapping[str, Any]]]) -> float:
    """Round the largest absolute value of all intervals and differences up, for the axis of the plots."""
    values = [
        abs(value[key] or 0.0)
        for of_model in differences
        for value in of_model.values()
        for key in ("low", "high", "difference")
    ]
    return next(limit for limit in _AXIS_LIMITS if limit >= max(values))


def _show(summary: Mapping[str, Any]) -> None:
    comparison, (first, *others) = summary["comparison"], _names(summary)
    for name, differences in zip(others, comparison["differences"], strict=True):
        show_differences(first, name, comparison["groups"], differences)
    if comparison["groups"] < bootstrap.FEW_GROUPS:
        console.print(f"only {comparison['groups']} groups: they say little about other microscopes")
    for warning in summary["warnings"]:
        console.print(warning)


def show_differences(
    first: str, second: str, groups: int, differences: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print the differences of two models from `paired.compare_values`, and what they show.

    Args:
        first: Name of the model A.
        second: Name of the model B.
        groups: Number of groups.
        differences: Per metric of `paired.METRICS`, B minus A.
    """
    header = f"95 %, {groups} groups"
    table = Table("", "A", "B", "B - A", header, "", title=f"A {first}\nB {second}", title_justify="left")
    for metric, label in METRICS.items():
        value = differences[metric]
        interval, zero = "-", ""
        if value["low"] is not None:
            interval = f"{value['low']:+.3f} to {value['high']:+.3f}"
            zero = "contains 0" if value["contains_zero"] else ""
        table.add_row(
            label,
            *("-" if value[key] is None else f"{value[key]:.3f}" for key in ("first", "second")),
            "-" if value["difference"] is None else f"{value['difference']:+.3f}",
            interval,
            zero,
        )
    console.print(table)
    console.print(str(_conclusion(differences)))
