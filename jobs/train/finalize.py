"""Finalize a training: make the calibrated bundle from the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ray.train import Result

from jobs.common import provenance
from jobs.common.console import console, now
from jobs.common.executor import Executor
from jobs.common.graphs import few_batches, with_float_graph
from jobs.common.images import Columns
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import collect_finite_columns
from jobs.evaluate.out_of_fold import store_answers
from jobs.train.gates import fit_gates
from jobs.train.initial_state import InitialState, draft_spec
from jobs.train.worker import HISTORY_FILE
from scalp_core import storage
from scalp_core.bundles.bundle import CARD_FILE, Bundle, save_bundle
from scalp_core.bundles.contract import WEIGHTS_FILE, BundleSpec, Teachers, Training
from scalp_core.bundles.model_card import render_model_card
from scalp_core.datasets.manifest import DataSpec
from scalp_core.datasets.other_symptoms import OTHER_LABELS
from scalp_core.evaluation import figures, subgroups
from scalp_core.evaluation.targets import parse_targets
from scalp_core.grades import NUM_GRADES
from scalp_core.images.stability import grade_mix_limit
from scalp_core.inference import calibration
from scalp_core.inference.decision import other_answers
from scalp_core.inference.fitting import fit_decision, fit_other_symptoms
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe


def make_bundle(
    run: str,
    data: DataSpec,
    recipe: Recipe,
    start: InitialState,
    splits: dict[str, pa.Table],
    result: Result,
    device: Device,
    fold: int | None,
    teachers: Teachers | None,
    executor: Executor,
) -> dict[str, Any]:
    """Write the bundle of the best epoch, calibrated on the validation split; return the summary."""
    spec = start.spec
    checkpoint, best = max(result.best_checkpoints, key=lambda pair: pair[1]["val_qwk"])
    with checkpoint.as_directory() as folder:
        weights = Path(folder, WEIGHTS_FILE).read_bytes()
    history = _history(result)
    train = splits["train"]
    labels = np.array(train["label"].to_pylist())
    training = Training(
        recipe=recipe.model_dump(),
        initial_weights=start.record,
        workers=max(entry["workers"] for entry in history),
        best_epoch=best["epoch"],
        data_sha256=data.sha256,
        labels_sha256=data.labels_sha256 if recipe.symptoms == "all" else None,
        grade_counts=np.bincount(labels, minlength=NUM_GRADES).tolist(),
        grade_mix_limit=grade_mix_limit(labels, train["group"].to_pylist()),
        split=data.split,
        fold=fold,
        synthetic=data.synthetic,
        reviews=data.reviews,
        extends=data.extends,
        teachers=teachers,
    )
    bundle_spec = draft_spec(recipe, spec, weights, training, Path(run).name, data.symptom)
    bundle = with_float_graph(
        Bundle(bundle_spec, files={WEIGHTS_FILE: weights}), few_batches(splits["val"], spec)
    )
    bundle_spec = _fit_decision(run, bundle, recipe, splits, ModelOptions(device=device), executor)
    for target in bundle_spec.referral.targets or ():
        console.print(str(target))
    figure = figures.plot_curves(
        history, best["epoch"], "LEAKY SPLIT: metrics are too optimistic" * data.split.leaky
    )
    storage.write(storage.join(run, "curves.png"), figure)
    files = {CARD_FILE: render_model_card(bundle_spec).encode(), "curves.png": figure}
    save_bundle(storage.join(run, "bundle"), bundle_spec, bundle.files | files)
    return {
        "kind": "train",
        "date": now(),
        "model_version": bundle_spec.model_version,
        "recipe": recipe.model_dump(),
        "workers": training.workers,
        "fold": fold,
        "split_method": data.split.method,
        "leaky": data.split.leaky,
        "leaking_pairs": data.split.leaking_pairs,
        "best_epoch": best["epoch"],
        "validation": bundle_spec.metrics["val"],
        "temperature": bundle_spec.temperature,
        "bias": list(bundle_spec.bias or ()),
        "conformal": bundle_spec.conformal.model_dump(mode="json"),
        "referral": bundle_spec.referral.model_dump(mode="json"),
        "history": history,
        "machine": provenance.machine(),
        "versions": bundle_spec.versions,
        "git_revision": bundle_spec.git_revision,
    }


def _history(result: Result) -> list[dict[str, Any]]:
    """Read the history, one entry per epoch, from the last checkpoint, which covers restarts."""
    with result.checkpoint.as_directory() as folder:
        return json.loads(Path(folder, HISTORY_FILE).read_text())


def _fit_decision(
    run: str,
    bundle: Bundle,
    recipe: Recipe,
    splits: dict[str, pa.Table],
    options: ModelOptions,
    executor: Executor,
) -> BundleSpec:
    """Fit gates, calibration, grade sets and referral rule on the validation split, and add its metrics.

    The answers to the validation split are stored in the run directory.
    """
    val = splits["val"]
    labels, groups = np.array(val["label"].to_pylist()), val["group"].to_pylist()
    columns, computation = collect_finite_columns(bundle, val, options, executor)
    gates = fit_gates(splits["train"], columns["statistics"], bundle.spec.preprocess, executor.uses_ray)
    spec = fit_decision(
        bundle.spec.model_copy(update={"gates": gates}),
        columns["logits"],
        columns["statistics"],
        labels,
        groups,
        coverage=recipe.coverage,
        targets=parse_targets(recipe.referral),
        prior_moved=recipe.moves_prior,
    )
    spec, other_scores = _fit_other_symptoms(spec, splits, columns)
    store_answers(run, val, columns, spec)
    metrics = subgroups.validation_metrics(
        labels,
        calibration.probabilities(columns["logits"], 1.0),
        calibration.calibrated(columns["logits"], spec),
        groups,
        {name: val[name].to_pylist() for name in ("position", "sex", "age")},
    )
    measured = {"computed_by": computation.computed_by} | metrics | other_scores
    return spec.model_copy(update={"metrics": {"val": measured}})


def _fit_other_symptoms(
    spec: BundleSpec, splits: dict[str, pa.Table], columns: Columns
) -> tuple[BundleSpec, dict[str, Any]]:
    """Calibrate the other symptoms on the validation split; return the contract and their metrics."""
    if not spec.other_symptoms:
        return spec, {}
    train, val = (np.array(splits[name][OTHER_LABELS].to_pylist()) for name in ("train", "val"))
    names = [symptom.name for symptom in spec.other_symptoms]
    counts = (train >= 0).sum(axis=0).tolist()
    spec = fit_other_symptoms(spec, names, counts, columns["other_logits"], val)
    answers = {name: grades for name, (grades, _) in other_answers(columns["other_logits"], spec).items()}
    groups = splits["val"]["group"].to_pylist()
    return spec, {"other_symptoms": subgroups.score_other_symptoms(names, val, answers, groups)}
