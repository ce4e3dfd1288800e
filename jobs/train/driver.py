"""`scalp train`: data-parallel fine-tuning on Ray, to a calibrated bundle."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    ScalingConfig,
    TrainingFailedError,
)
from ray.util.queue import Queue

from cluster.local import Cluster, connect
from jobs.common.console import SUMMARY_FILE, console, read_json, show, write_json
from jobs.common.preflight import check_nodes, examples
from jobs.train.ingest import cache_budget, cache_images, describe_cache
from jobs.train.progress import ControllerCallback, follow_progress
from jobs.train.scaling import ElasticScaling, plan_scaling, wait_for_workers, worker_range
from jobs.train.tracking import Tracker, Tracking, open_tracker, tolerate_errors
from scalp_core import storage
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import images_per_epoch
from scalp_core.settings import rename_old_keys
from scalp_core.storage import outputs

RECIPES = Path(__file__).parents[1] / "recipes"

KIND = "train"
IDENTITY_FILE = "run.json"
_MAX_WORKER_FAILURES = 3
# Ray learns of a lost node up to 20 s late, and an elastic run waits this long for room on it before it
# counts the nodes again.
_START_TIMEOUT_S = 10


def train(
    data: str,
    run: str,
    recipe: Recipe,
    workers: tuple[int, int] | int | None = None,
    device: Device = "auto",
    fold: int | None = None,
    tracking: Tracking = "tensorboard",
) -> dict[str, Any]:
    """Trains a bundle; a run that was stopped goes on from its last epoch, a finished one ends at once.

    Args:
        data: directory that `scalp prepare` wrote.
        run: directory for checkpoints, curves and the bundle, local or `s3://`.
        recipe: what to train and how.
        workers: data-parallel workers, or the fewest and the most of a run that grows and shrinks with the
            cluster; None takes one for each GPU, else two.
        device: auto, cpu or cuda.
        fold: of `scalp prepare --folds`, to validate on; None takes the validation part.
        tracking: where the figures of each epoch are written besides: below `run`, or to an MLflow server.

    Returns:
        the summary that is also written to `run/summary.json`.

    Raises:
        UserError: bad input, `run` holds something else or is in use, the machine cannot hold the workers, or
            MLflow does not answer.
    """
    run, started = storage.absolute(run), time.monotonic()
    outputs.check_output(run, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if fold is not None:
        table = manifest.apply_fold(table, fold)
    parts = {name: manifest.select_split(table, name) for name in ("train", "val")}
    identity: dict[str, Any] = {"recipe": recipe.model_dump(), "data_sha256": data_spec.sha256, "fold": fold}
    check_identity(run, identity)
    if summary := _finished(run):
        return summary
    # PyTorch and timm take seconds: the mistakes above are told before.
    from jobs.train.initial_state import (
        initial_uri,
        load_initial_state,
        make_initial_state,
        save_initial_state,
    )

    saved = load_initial_state(run)
    start = saved or make_initial_state(recipe)
    check_batch_norm(recipe, start.batch_norm)
    asked = (workers, workers) if isinstance(workers, int) else workers
    cluster = wait_for_workers(connect(), asked, device)
    scaling = plan_scaling(cluster, asked, device)
    check_batches(recipe, parts["train"].num_rows, scaling)
    tracked_as = identity | {"synthetic": data_spec.synthetic}
    with outputs.open_output(run, KIND, [data]) as output, open_tracker(tracking, run, tracked_as) as tracker:
        if summary := _finished(run):  # by another process, since the first look
            return summary
        check_nodes(examples(parts), run)
        # All that a user could have to fix was checked: from here on the directory is this run's.
        write_json(storage.join(run, IDENTITY_FILE), identity)
        if not saved:
            save_initial_state(run, start)
        console.print(_opening(recipe, parts["train"].num_rows, scaling))
        if start.batch_norm:
            console.print(batch_norm_line(recipe, scaling))
        for line in (f"first weights: {start.record}", *start.notes):
            console.print(line)
        result = _train_workers(recipe, start.spec, parts, initial_uri(run), run, cluster, scaling, tracker)
        trained = time.monotonic() - started
        output.check()
        from jobs.train.finalize import make_bundle

        summary = make_bundle(run, data_spec, recipe, start, parts, result, device, fold)
        summary["train_seconds"], summary["seconds"] = round(trained, 1), round(time.monotonic() - started, 1)
        write_json(storage.join(run, SUMMARY_FILE), summary)
        with tolerate_errors():
            tracker.finish(summary)
    _show(summary, run)
    for warning in (data_spec.split.warning, data_spec.warning):
        if warning:
            console.print(warning)
    return summary


def _finished(run: str) -> dict[str, Any] | None:
    summary = read_json(storage.join(run, SUMMARY_FILE))
    if summary:
        console.print(f"{run} is finished; its bundle is {storage.join(run, 'bundle')}")
    return summary


def _opening(recipe: Recipe, rows: int, scaling: ScalingConfig) -> str:
    fewest, most = worker_range(scaling)
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    shares = sorted({recipe.batch_size // most, -(-recipe.batch_size // fewest)})
    return (
        f"training {recipe.architecture} on {rows} photographs: {workers} "
        f"workers x {' to '.join(map(str, shares))} photographs a step = {recipe.batch_size}, "
        f"{images_per_epoch(rows, recipe.augment) // recipe.batch_size} steps an epoch; learning rate "
        f"{recipe.learning_rate:g}, for any number of workers"
    )


def batch_norm_line(recipe: Recipe, scaling: ScalingConfig) -> str:
    """Over which images batch normalization takes its statistics, and why."""
    fewest, most = worker_range(scaling)
    norm = recipe.resolve_batch_norm(most)
    if norm == "frozen":
        return "batch normalization: frozen at the statistics of the first weights"
    together = recipe.batch_size // recipe.accumulate
    if norm == "sync":
        return (
            f"batch normalization: over the {together} images that all workers have at a time, about "
            f"{together // most} each"
        )
    images = sorted({together // most, together // fewest})
    return f"batch normalization: over each worker's {' to '.join(map(str, images))} images at a time"


def _train_workers(
    recipe: Recipe,
    spec: Preprocess,
    parts: dict[str, pa.Table],
    initial: str,
    run: str,
    cluster: Cluster,
    scaling: ScalingConfig,
    tracker: Tracker,
) -> Result:
    """Decodes, trains, and lets go of the decoded photographs."""
    room = cache_budget()
    val, kept_val = cache_images(parts["val"], spec, room // 4)
    train, kept_train = cache_images(parts["train"], spec, room * 3 // 4)
    console.print(describe_cache(train, cluster))
    with follow_progress(run, recipe, tracker, scaling.min_workers) as notes:
        config = {
            "recipe": recipe.model_dump(),
            "train": train,
            "val": val,
            "grade_counts": np.bincount(train.labels, minlength=NUM_GRADES).tolist(),
            "initial_weights": initial,
            "batch_norm": recipe.resolve_batch_norm(worker_range(scaling)[1]),
            "notes": notes,
        }
        result = _fit(config, run, scaling, notes)
    del kept_train, kept_val
    return result


def check_identity(run: str, identity: dict[str, Any], argument: str = "RUN") -> None:
    """Check that a run directory belongs to a run with the same settings and data.

    Args:
        run: Run directory, local or `s3://`.
        identity: Settings and data of the run to start.
        argument: Name of the command's argument, for the message.

    Raises:
        UserError: The directory holds a run with other settings or data.
    """
    stored = read_json(storage.join(run, IDENTITY_FILE)) or identity
    known = {name: rename_old_keys(value) for name, value in stored.items()}
    if known != identity:
        old, new = known | known["recipe"], identity | identity["recipe"]
        changed = [name for name in new | old if name != "recipe" and old.get(name) != new.get(name)]
        raise UserError(f"{run} holds a run with another {', '.join(changed)}; choose another {argument}")


def check_batch_norm(recipe: Recipe, has_batch_norm: bool) -> None:
    """Refuses a setting of batch normalization for an architecture without it.

    Raises:
        UserError: it would have no effect.
    """
    if recipe.batch_norm in ("sync", "frozen") and not has_batch_norm:
        raise UserError(
            f"batch_norm ({recipe.batch_norm}) has no effect with architecture: {recipe.architecture}, which "
            "has no batch normalization; use batch_norm=auto, or another architecture"
        )


def check_batches(recipe: Recipe, rows: int, scaling: ScalingConfig) -> None:
    """Refuses batches that these workers cannot cut, or that the photographs do not fill."""
    workers = worker_range(scaling)[1]
    # Batch normalization needs two photographs in every piece.
    if recipe.batch_size // workers // recipe.accumulate < 2:
        raise UserError(
            f"batch_size {recipe.batch_size} is less than 2 for each of {workers} workers in "
            f"{recipe.accumulate} pieces; use --set batch_size={2 * workers * recipe.accumulate} or more"
        )
    if rows < recipe.batch_size:
        raise UserError(
            f"{rows} training photographs do not fill one batch of {recipe.batch_size}; "
            "use --set batch_size=… or more photographs"
        )


def _fit(config: dict[str, Any], run: str, scaling: ScalingConfig, notes: Queue) -> Result:
    from jobs.train.trainer import divergence_message, make_trainer

    if isinstance(scaling, ElasticScaling):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    checkpoints = CheckpointConfig(
        num_to_keep=2, checkpoint_score_attribute="val_qwk", checkpoint_score_order="max"
    )
    failures = FailureConfig(max_failures=_MAX_WORKER_FAILURES)
    try:
        result = make_trainer(
            config,
            run,
            scaling,
            callbacks=[ControllerCallback(notes)],
            checkpoint_config=checkpoints,
            failure_config=failures,
        ).fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"training in {run} failed {_MAX_WORKER_FAILURES + 1} times, the last time with: {reason}; "
            "SCALP_RAY_LOGS=1 shows the workers' output, and the same command goes on after the last epoch"
        ) from error
    if stopped := divergence_message(result):
        raise UserError(f"training in {run} stopped: {stopped}; choose another RUN")
    return result


def _show(summary: dict[str, Any], run: str) -> None:
    validation = summary["validation"]
    show(
        "train",
        {
            "model": summary["model_version"],
            "best epoch": summary["best_epoch"],
            "validation QWK": validation["qwk"],
            "validation top-1": validation["top1"],
            "seconds": summary["seconds"],
            "bundle": storage.join(run, "bundle"),
            "curves": storage.join(run, "curves.png"),
        },
    )
