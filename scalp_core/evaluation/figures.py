"""Plots as PNG bytes: training curves, confusion matrix, reliability, risk and coverage, slices, search."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from scalp_core.evaluation.paired import METRICS
from scalp_core.grades import GRADE_NAMES, NUM_GRADES

_DPI = 120
_TRAIN, _VAL = "#1f5fa8", "#c8541f"
_SLICES_SHOWN = 12  # per column
_PANELS_PER_ROW = 3
_LOG_TICKS = 4
_LABEL_WIDTH = 9  # characters


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.set_dpi(_DPI)
    FigureCanvasAgg(figure).print_png(buffer)  # savefig computes the layout twice
    plt.close(figure)
    return buffer.getvalue()


def plot_curves(history: list[dict[str, Any]], best_epoch: int, title: str = "") -> bytes:
    """Plot loss and accuracy per epoch, for training and validation.

    Args:
        history: Per epoch `epoch, train_loss, val_loss, train_top1, val_top1, val_qwk`.
        best_epoch: Epoch whose weights were saved.
        title: Title of the plot.
    """
    epochs = [entry["epoch"] for entry in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric, heading in ((left, "loss", "log loss"), (right, "top1", "top-1 accuracy, kappa")):
        for split, color in (("train", _TRAIN), ("val", _VAL)):
            values = [entry[f"{split}_{metric}"] for entry in history]
            axis.plot(
                epochs, values, "o-", color=color, label="training" if split == "train" else "validation"
            )
        axis.set(xlabel="epoch", title=heading)
        axis.axvline(best_epoch, color="gray", linestyle=":", label=f"kept: epoch {best_epoch}")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylim(bottom=0)
    right.plot(
        epochs, [entry["val_qwk"] for entry in history], "s--", color="#3a8a3a", label="validation QWK"
    )
    # The kappa of an untrained model can be negative.
    right.set_ylim(min(0.0, *(entry["val_qwk"] for entry in history)), 1)
    left.legend()
    right.legend()
    figure.suptitle(title)
    return _png(figure)


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], title: str, note: str = "") -> bytes:
    """Plot a confusion matrix (4, 4) of counts, rows are the labels, shaded by the share of its row."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [f"{index} {name}" for index, name in enumerate(GRADE_NAMES)]
    axis.set(xticks=range(NUM_GRADES), yticks=range(NUM_GRADES), xticklabels=names, yticklabels=names)
    axis.set(xlabel="predicted", ylabel="label", title=title)
    for row in range(NUM_GRADES):
        for column in range(NUM_GRADES):
            axis.text(
                column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center",
                color="white" if shares[row, column] > 0.5 else "black",
            )  # fmt: skip
    figure.colorbar(picture, ax=axis, shrink=0.8, label="share of the label's row")
    if note:
        figure.supxlabel(note, fontsize=8, color="#444444")
    return _png(figure)


def plot_reliability(calibrated: Mapping[str, Any], title: str) -> bytes:
    """Plot a reliability diagram of `subgroups.measure_calibration`: accuracy per bin of probability."""
    figure, (axis, counts) = plt.subplots(
        2, 1, figsize=(5.6, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfect calibration")
    for when, name, color, style in (
        ("before", "without temperature", _VAL, "s--"),
        ("after", "calibrated", _TRAIN, "o-"),
    ):
        bins, chance = calibrated[f"reliability_{when}"], calibrated[f"if_calibrated_{when}"]
        if bins is None:
            continue
        filled = [row for row in bins if row["n"]]
        x, y = [row["confidence"] for row in filled], [row["top1"] for row in filled]
        label = f"{name}, ECE {calibrated[f'ece_{when}']:.3f} ({chance['mean']:.3f} expected)"
        axis.plot(x, y, style, color=color, label=label, markersize=4)
        edges = [row["low"] for row in bins] + [bins[-1]["high"]]
        counts.stairs([row["n"] for row in bins], edges, color=color, fill=when == "after", alpha=0.6)
    axis.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is right", title=title)
    counts.set(xlabel="probability of the likeliest grade", ylabel="images", ylim=(0, None))
    axis.legend(loc="lower right", fontsize=8)
    for panel in (axis, counts):
        panel.grid(alpha=0.3)
    figure.supxlabel(
        "expected: ECE of a perfectly calibrated model on as many images, "
        f"95 % up to {calibrated['if_calibrated_after']['high']:.3f}",
        fontsize=8, color="#444444",
    )  # fmt: skip
    return _png(figure)


def plot_risk_coverage(curve: Mapping[str, Any], title: str) -> bytes:
    """Plot error against coverage (`subgroups.measure_risk_coverage`), and the point of the referral rule."""
    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    lines, point = curve["curve"], curve["referral"]
    for name, label, area, color in (
        ("error", "share that is wrong", "aurc", _TRAIN),
        ("mae", "mean distance, grades", "aurc_mae", _VAL),
    ):
        axis.plot(lines["coverage"], lines[name], color=color, label=f"{label} (AURC {curve[area]:.3f})")
        axis.axhline(lines[name][-1], color=color, linestyle=":", alpha=0.5)
        if point[name] is not None:
            axis.plot(point["coverage"], point[name], "D", color=color, markeredgecolor="black", zorder=3)
    axis.axvline(
        point["coverage"], color="gray", linestyle="--", linewidth=1,
        label=f"referral rule: {1 - point['coverage']:.0%} to a person",
    )  # fmt: skip
    axis.plot([], [], color="gray", linestyle=":", label="all answered")
    axis.set(xlim=(0, 1), xlabel="share answered, the most confident first", title=title)
    axis.set_ylim(0, max(0.05, 1.15 * max(max(lines["error"]), max(lines["mae"]))))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    axis.grid(alpha=0.3)
    return _png(figure)


def plot_slices(
    by_column: Mapping[str, Sequence[Mapping[str, Any]]],
    overall: Mapping[str, Any],
    bounds: Mapping[str, Any],
    title: str,
) -> bytes:
    """Plot kappa and mean absolute error per slice with intervals.

    Args:
        by_column: Output of `subgroups.score_slices`; the plot shows the largest slices of each column.
        overall: Metrics of all images.
        bounds: Intervals of these metrics.
        title: Title of the plot.
    """
    rows: list[tuple[str, Mapping[str, Any]]] = [("all", {**overall, "intervals": bounds, "small": False})]
    for column, column_slices in by_column.items():
        largest = sorted(column_slices, key=lambda row: -row["n"])[:_SLICES_SHOWN]
        rows += [(f"{column} {row['value']}", row) for row in column_slices if row in largest]
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 1.4 + 0.27 * len(rows)), layout="constrained", sharey=True
    )
    for axis, name, label in zip(axes, ("qwk", "mae"), ("kappa (QWK)", "mean absolute error"), strict=True):
        axis.axvline(overall[name] or 0.0, color="gray", linestyle=":")
        for height, (_, row) in enumerate(rows):
            color = "gray" if row["small"] else _TRAIN if height else "black"
            bound = row["intervals"][name]
            if bound is not None:
                axis.plot(
                    [bound["low"], bound["high"]], [height, height], color=color, linewidth=2, alpha=0.6
                )
            if row[name] is not None:
                axis.plot(row[name], height, "o", color=color, markersize=5)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    labels = [f"{name}  (n {row['n']:,})" for name, row in rows]
    axes[0].set_yticks(range(len(rows)), labels, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(
        "dotted: all images; bars: 95 % over groups, absent for a single group; gray: too few images",
        fontsize=8, color="#444444",
    )  # fmt: skip
    return _png(figure)


def plot_differences(differences: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> bytes:
    """Plot the differences of models from the first model with intervals.

    Args:
        differences: `differences` of `paired.compare_answers`, per model after the first.
        names: Name of each of these models.
        title: Title of the plot.
    """
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.34 * len(METRICS) * len(names)), layout="constrained")
    axis.axvline(0, color="gray", linestyle=":")
    step = 0.8 / len(names)
    for model, (name, of_model) in enumerate(zip(names, differences, strict=True)):
        for row, metric in enumerate(METRICS):
            value, height = of_model[metric], row + step * (model - (len(names) - 1) / 2)
            if value["low"] is not None:
                axis.plot([value["low"], value["high"]], [height, height], color=f"C{model}", linewidth=2)
            if value["difference"] is not None:
                axis.plot(value["difference"], height, "o", color=f"C{model}", markersize=5)
        axis.plot([], [], "o-", color=f"C{model}", label=name)
    axis.set_yticks(range(len(METRICS)), list(METRICS.values()), fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="difference from the first model; bars: 95 % over groups", title=title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8)
    return _png(figure)


def plot_search(
    trials: Sequence[Mapping[str, Any]],
    axes: Mapping[str, Sequence[Any] | str],
    epochs: int,
    title: str,
) -> bytes:
    """Plot validation kappa of all trials per epoch, and each trial's best against each varied setting.

    Args:
        trials: `number, settings, status, history` of each trial, the best first.
        axes: Per setting the values of its list, or `linear` or `log` for a range.
        epochs: Epochs of a trial that ran to the end.
        title: Title of the plot.
    """
    shown = [trial for trial in trials if trial["history"]]
    rows = -(-len(axes) // _PANELS_PER_ROW)
    figure = plt.figure(figsize=(11, 4.2 + 2.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, _PANELS_PER_ROW, height_ratios=[1.4, *[1] * rows])
    top = figure.add_subplot(grid[0, :])
    for trial in reversed(shown):  # draws the best last, above the others
        best = trial is shown[0]
        top.plot(
            [entry["epoch"] for entry in trial["history"]], [entry["val_qwk"] for entry in trial["history"]],
            "-", color=_VAL if best else _TRAIN, linewidth=2.4 if best else 1.0, alpha=1 if best else 0.55,
        )  # fmt: skip
        history = trial["history"]
        end = max(history, key=lambda entry: entry["val_qwk"]) if best else history[-1]
        _mark(top, end["epoch"], end["val_qwk"], trial, best)
    top.set(xlabel="epoch", ylabel="kappa (QWK)", xlim=(0.8, epochs + 0.2), title=title)
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.grid(alpha=0.3)
    first: Any = None
    for place, (name, values) in enumerate(axes.items()):
        panel = figure.add_subplot(grid[1 + place // _PANELS_PER_ROW, place % _PANELS_PER_ROW], sharey=first)
        first = first or panel
        _against(panel, name, values, shown)
        if place % _PANELS_PER_ROW == 0:
            panel.set_ylabel("best kappa (QWK)")
    best_label = f"trial {shown[0]['number']}, the best, in its best epoch"
    handles = [
        top.plot([], [], "*", color=_VAL, markersize=14, markeredgecolor="black", label=best_label)[0],
        top.plot([], [], "s", color="black", label="trial 1, the unchanged recipe")[0],
        top.plot([], [], "o", color=_TRAIN, label="all epochs")[0],
        top.plot([], [], "o", color=_TRAIN, markerfacecolor="white", label="stopped early, or failed")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return _png(figure)


def _mark(axis: Any, x: float, y: float, trial: Mapping[str, Any], best: bool) -> None:
    if best:
        axis.plot(x, y, "*", color=_VAL, markersize=14, markeredgecolor="black", zorder=5)
        return
    first = trial["number"] == 1
    color, face = "black" if first else _TRAIN, None if trial["status"] == "finished" else "white"
    axis.plot(x, y, "s" if first else "o", color=color, markerfacecolor=face, markersize=6)


def _against(panel: Any, name: str, values: Sequence[Any] | str, trials: Sequence[Mapping[str, Any]]) -> None:
    """Plot each trial's best kappa against one setting."""
    trials_with = [trial for trial in trials if name in trial["settings"]]  # others have no such setting
    for trial in reversed(trials_with):
        value = trial["settings"][name]
        x = value if isinstance(values, str) else values.index(value)
        y = max(entry["val_qwk"] for entry in trial["history"])
        _mark(panel, x, y, trial, trial is trials[0])
    panel.set_xlabel(name)
    panel.margins(y=0.12)
    panel.grid(alpha=0.3)
    if isinstance(values, str):
        panel.set_xscale(values)
        drawn = [value for trial in trials_with if (value := trial["settings"][name]) > 0]
        if values == "log" and drawn:  # matplotlib's labels overlap, or exist only at powers of ten
            labels = [f"{tick:.2g}" for tick in np.geomspace(min(drawn), max(drawn), _LOG_TICKS)]
            panel.set_xticks([float(label) for label in labels], labels)
            panel.xaxis.set_minor_locator(NullLocator())
        return
    names = [textwrap.fill(str(value).replace("_", " "), _LABEL_WIDTH) for value in values]
    panel.set_xticks(range(len(values)), names, fontsize=9)
    panel.set_xlim(-0.5, len(values) - 0.5)
