"""Results of `scalp tune`: the table of trials, the plot and the best recipe."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from jobs.common import provenance
from jobs.common.console import console, now
from jobs.tune.trials import METRIC, Trial
from scalp_core import storage
from scalp_core.datasets.manifest import DataSpec
from scalp_core.evaluation import figures
from scalp_core.models.recipe import Recipe
from scalp_core.models.search_space import Space, with_settings

BEST_FILE = "best.yaml"


def write_results(
    out: str,
    data_spec: DataSpec,
    identity: dict[str, Any],
    recipe: Recipe,
    space: Space,
    trials: list[Trial],
) -> dict[str, Any]:
    """Write the table, the plot and the best recipe; return the summary."""
    ranked = _ranked(trials)
    best, epoch = ranked[0], ranked[0].best or {}
    title = "kappa on validation" + " (LEAKY SPLIT: metrics are too optimistic)" * data_spec.split.leaky
    storage.write(storage.join(out, "trials.csv"), _csv(trials, space))
    unchanged = trials[0].settings  # its values may be outside the space
    axes = {
        key: tuple(dict.fromkeys((*values, unchanged.get(key, values[0]))))
        if isinstance(values, tuple)
        else values.scale
        for key, values in space.items()
    }
    rows = [dataclasses.asdict(trial) for trial in ranked]
    picture = figures.plot_search(rows, axes, recipe.epochs, title)
    storage.write(storage.join(out, "tune.png"), picture)
    heading = (
        f"# The best of {len(trials)} trials by validation kappa: trial {best.number}, QWK "
        f"{epoch[METRIC]:.4f} in epoch {epoch['epoch']}.\n"
    )
    best_recipe = with_settings(recipe, best.settings, f"trial {best.number}")
    text = heading + yaml.safe_dump(best_recipe.model_dump(), sort_keys=False)
    storage.write(storage.join(out, BEST_FILE), text.encode())
    return {
        "kind": "tune",
        "date": now(),
        **identity,
        "split_method": data_spec.split.method,
        "leaky": data_spec.split.leaky,
        "statuses": dict(Counter(trial.status for trial in trials)),
        "best": {"trial": best.number, "settings": best.settings} | epoch,
        "rows": rows,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "git_revision": provenance.git_revision(),
    }


def _ranked(trials: list[Trial]) -> list[Trial]:
    """Sort trials, the best first and failed ones last."""

    def sort_key(trial: Trial) -> tuple[bool, float, int]:
        return trial.status != "failed", trial.best[METRIC] if trial.best else -np.inf, -trial.number

    return sorted(trials, key=sort_key, reverse=True)


def _row(trial: Trial, keys: Iterable[str] = ()) -> dict[str, Any]:
    best = trial.best or {}
    return {
        "trial": trial.number,
        **{key: trial.settings.get(key) for key in keys},  # None for settings without an effect
        "epochs": trial.history[-1]["epoch"] if trial.history else 0,
        "best_epoch": best.get("epoch"),
        "val_qwk": best.get("val_qwk"),
        "val_top1": best.get("val_top1"),
        "seconds": round(sum(entry["seconds"] for entry in trial.history), 1),
        "status": trial.status,
        "reason": trial.reason,
    }


def _csv(trials: list[Trial], keys: Iterable[str]) -> bytes:
    text = io.StringIO()
    rows = [_row(trial, keys) for trial in trials]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def show_trials(trials: list[Trial]) -> None:
    """Print the table of trials, the best first."""
    table = Table(title="tune", title_justify="left", title_style="bold")
    for heading in ("trial", "QWK", "top-1", "epochs", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    # One column for all settings: with a column per setting, they would be too narrow to read.
    table.add_column("settings", overflow="fold")
    for place, trial in enumerate(_ranked(trials)):
        row = _row(trial)
        metrics = ("" if row[name] is None else f"{row[name]:.3f}" for name in ("val_qwk", "val_top1"))
        remarks = "; ".join(filter(None, (format_settings(trial.settings), trial.reason)))
        cells = (
            str(trial.number),
            *metrics,
            str(row["epochs"]),
            f"{row['seconds']:.0f}",
            trial.status,
            remarks,
        )
        table.add_row(*cells, style="" if place else "bold")
    console.print(table)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings as in `learning_rate 0.001, loss corn`."""
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
