"""`scalp train --folds N`: one training per fold, and out-of-fold answers to all images of train and val."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from jobs.common.console import SUMMARY_FILE, console, now, show, write_json
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import collect_columns, make_answers
from jobs.train.driver import train
from jobs.train.tracking import Tracking
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, metrics
from scalp_core.evaluation.label_errors import OUT_OF_FOLD_FILE
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe
from scalp_core.storage import outputs, parquet

KIND = "train --folds"
_COLUMNS = ["image_id", "uri", "member", "label", "group", "fold"]


def train_folds(
    data: str,
    run: str,
    recipe: Recipe,
    folds: int,
    workers: tuple[int, int] | int | None = None,
    device: Device = "auto",
    tracking: Tracking = "tensorboard",
) -> dict[str, Any]:
    """Train one bundle per fold, one after another, each as `train` does with `fold`.

    Args:
        data: Directory that `scalp prepare --folds` wrote.
        run: Output directory: the run directories `fold-0`, …; `out_of_fold.parquet` with the logits and
            calibrated probabilities of each image from the bundle that was not trained on it; `summary.json`.
        recipe: Training recipe.
        folds: Number of folds of the data.
        workers: As in `train`.
        device: As in `train`.
        tracking: As in `train`.

    Returns:
        The summary, with the metrics of the out-of-fold answers and their intervals over groups.

    Raises:
        UserError: The data have another number of folds, or as in `train`.
    """
    run = storage.absolute(run)
    outputs.check_output(run, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if data_spec.split.folds != folds:
        raise UserError(
            f"--folds {folds}: {data} was prepared with {data_spec.split.folds or 'no'} folds; run scalp "
            f"prepare SOURCE OUT --folds {folds}"
        )
    with outputs.open_output(run, KIND, [data]) as output:
        parts, kappas = [], []
        for fold in range(folds):
            console.print(f"fold {fold} of {folds}")
            folder = storage.join(run, f"fold-{fold}")
            trained = train(data, folder, recipe, workers, device, fold, tracking)
            kappas.append(trained["validation"]["qwk"])
            parts.append(_answer_fold(folder, manifest.apply_fold(table, fold), device))
        rows = pa.concat_tables(parts)
        labels = np.array(rows["label"].to_pylist())
        probs = np.array(rows["probabilities"].to_pylist())
        output.check()
        parquet.write(storage.join(run, OUT_OF_FOLD_FILE), rows)
        summary = {
            "kind": KIND,
            "date": now(),
            "data_sha256": data_spec.sha256,
            "folds": folds,
            "recipe": recipe.model_dump(),
            "synthetic": data_spec.synthetic,
            "leaky": data_spec.split.leaky,
            "metrics": metrics.score(labels, probs.argmax(axis=1))
            | metrics.score_probabilities(labels, probs),
            "intervals": bootstrap.bootstrap_metrics(labels, probs, rows["group"].to_pylist()),
            "by_fold": kappas,
        }
        write_json(storage.join(run, SUMMARY_FILE), summary)
    _show(summary, run)
    for warning in filter(None, (data_spec.split.warning, data_spec.warning)):
        console.print(warning)
    return summary


def _answer_fold(run: str, table: pa.Table, device: Device) -> pa.Table:
    """Grade the validation images of a fold with the bundle of its run."""
    bundle, rows = load_bundle(run), manifest.select_split(table, "val")
    columns, _ = collect_columns(bundle, rows, ModelOptions(device))
    _, probs, _ = make_answers(columns, np.array(rows["label"].to_pylist()), bundle.spec)
    answers = {"logits": pa.array(columns["logits"].tolist()), "probabilities": pa.array(probs.tolist())}
    rows = rows.select(_COLUMNS)
    for name, column in answers.items():
        rows = rows.append_column(name, column)
    return rows


def _show(summary: dict[str, Any], run: str) -> None:
    scores, bounds = summary["metrics"], summary["intervals"]
    rows = {"images, each out-of-fold": f"{scores['n']:,} in {bounds['groups']} groups"}
    for name, label in (("qwk", "QWK"), ("top1", "top-1"), ("log_loss", "log loss")):
        bound, value = bounds[name], scores[name]
        interval = f" ({bound['low']:.3f} to {bound['high']:.3f})" if bound else ""
        rows[label] = "-" if value is None else f"{value:.3f}{interval}"
    rows["QWK per fold"] = ", ".join(f"{value:.3f}" for value in summary["by_fold"])
    rows["answers"] = storage.join(run, OUT_OF_FOLD_FILE)
    show("train --folds", rows)
