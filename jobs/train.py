"""`scalp train`: data-parallel fine-tuning on Ray, to a calibrated bundle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    ScalingConfig,
    TrainingFailedError,
)
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.local import Cluster, connect
from jobs.console import SUMMARY_FILE, console, progress_bar, read_json, show, write_json
from jobs.ingest import cache_line, cache_room, cached
from jobs.tracking import Tracker, Tracking
from jobs.train_bundle import make_bundle
from jobs.trainer import trainer
from scalp_core import manifest, storage
from scalp_core.bundle import serialise_weights
from scalp_core.epochs import photographs_an_epoch
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.model import initial_model, preprocess_for
from scalp_core.predictor import Device
from scalp_core.preprocess import Preprocess
from scalp_core.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"

IDENTITY_FILE = "run.json"
_MAX_WORKER_FAILURES = 3
CPUS_FOR_DATA = 2
_SECONDS_BETWEEN_RESIZES = 30.0


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
        tracking: where the figures of each epoch are written besides, below `run`.

    Returns:
        the summary that is also written to `run/summary.json`.

    Raises:
        UserError: bad input, or the machine cannot hold the workers.
    """
    run, started = storage.absolute(run), time.monotonic()
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if fold is not None:
        table = manifest.with_fold(table, fold)
    parts = {name: manifest.part(table, name) for name in ("train", "val")}
    identity: dict[str, Any] = {"recipe": recipe.model_dump(), "data_sha256": data_spec.sha256, "fold": fold}
    check_identity(run, identity)
    if summary := read_json(storage.join(run, SUMMARY_FILE)):
        console.print(f"{run} is finished; its bundle is {storage.join(run, 'bundle')}")
        return summary
    model = initial_model(recipe.architecture, recipe.weights, recipe.seed, recipe.head)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    cluster = connect()
    scaling = scaling_for(cluster, (workers, workers) if isinstance(workers, int) else workers, device)
    check_batches(recipe, parts["train"].num_rows, scaling)
    # Everything that a user could have to mend is behind us: from here on the directory is this run's.
    write_json(storage.join(run, IDENTITY_FILE), identity)
    initial = storage.join(run, "initial.safetensors")
    storage.write(initial, serialise_weights(model.state_dict()))
    console.print(_opening(recipe, parts["train"].num_rows, scaling))
    tracker = Tracker(run, recipe, tracking)
    result = _train_workers(recipe, spec, parts, initial, run, cluster, scaling, tracker)
    tracker.close()
    trained = time.monotonic() - started
    summary = make_bundle(run, data_spec, recipe, spec, parts, result, device, fold)
    summary["train_seconds"], summary["seconds"] = round(trained, 1), round(time.monotonic() - started, 1)
    write_json(storage.join(run, SUMMARY_FILE), summary)
    _show(summary, run)
    if data_spec.split.warning:
        console.print(data_spec.split.warning)
    return summary


def _opening(recipe: Recipe, rows: int, scaling: ScalingConfig) -> str:
    fewest, most = scaling.min_workers, scaling.max_workers
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    shares = sorted({recipe.batch_size // most, -(-recipe.batch_size // fewest)})
    return (
        f"training {recipe.architecture} from {recipe.weights} weights on {rows} photographs: {workers} "
        f"workers x {' to '.join(map(str, shares))} photographs a step = {recipe.batch_size}, "
        f"{photographs_an_epoch(rows, recipe.augment) // recipe.batch_size} steps an epoch; learning rate "
        f"{recipe.learning_rate:g}, for any number of workers"
    )


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
    room = cache_room()
    val, kept_val = cached(parts["val"], spec, room // 4)
    train, kept_train = cached(parts["train"], spec, room * 3 // 4)
    console.print(cache_line(train, cluster))
    with _progress(recipe.epochs, tracker) as notes:
        config = {
            "recipe": recipe.model_dump(),
            "train": train,
            "val": val,
            "grade_counts": np.bincount(train.labels, minlength=NUM_GRADES).tolist(),
            "initial_weights": initial,
            "notes": notes,
        }
        result = _fit(config, run, scaling)
    del kept_train, kept_val
    return result


def check_identity(run: str, identity: dict[str, Any], argument: str = "RUN") -> None:
    """Refuses to go on with a run of other settings or data; `argument` is what the caller names it."""
    known = read_json(storage.join(run, IDENTITY_FILE)) or identity
    if known != identity:
        old, new = known | known["recipe"], identity | identity["recipe"]
        changed = [name for name in new | old if name != "recipe" and old.get(name) != new.get(name)]
        raise UserError(
            f"{run} holds a run with another {', '.join(changed)}; choose another {argument}, or remove it"
        )


def parse_workers(text: str | None) -> tuple[int, int] | None:
    """`4` as (4, 4) and `2:8` as (2, 8), the fewest and the most; None stays None.

    Raises:
        UserError: neither of these.
    """
    if text is None:
        return None
    words = text.split(":")
    if not all(word.isdigit() and int(word) for word in words) or len(words) > 2:
        raise UserError(f"--workers {text}: write a number, or MIN:MAX such as 2:8")
    fewest, most = int(words[0]), int(words[-1])
    if fewest > most:
        raise UserError(f"--workers {text}: MIN is more than MAX; write --workers {most}:{fewest}")
    return fewest, most


def scaling_for(cluster: Cluster, workers: tuple[int, int] | None, device: Device) -> ScalingConfig:
    """Workers that this cluster can hold beside the data pipeline."""
    if device == "cuda" and not cluster.gpus:
        raise UserError(
            "--device cuda: Ray sees no GPU; use --device cpu or auto, or join a cluster that has one"
        )
    use_gpu = device != "cpu" and cluster.gpus > 0
    fewest, most = workers or ((cluster.gpus if use_gpu else 2),) * 2
    # Each worker holds a CPU, and the data pipeline needs at least two to make progress.
    room = min(cluster.gpus, cluster.cpus - CPUS_FOR_DATA) if use_gpu else cluster.cpus - CPUS_FOR_DATA
    if fewest > room:
        what = "GPUs" if use_gpu else f"CPUs, of which the data pipeline keeps {CPUS_FOR_DATA}"
        have = cluster.gpus if use_gpu else cluster.cpus
        raise UserError(
            f"--workers {fewest}: Ray has {have} {what}; use --workers {max(1, room)} or a larger cluster"
        )
    most = most if workers and fewest < most else fewest
    return ScalingConfig(
        num_workers=(fewest, most) if fewest < most else fewest,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": 1, "GPU": int(use_gpu)},
        elastic_resize_monitor_interval_s=_SECONDS_BETWEEN_RESIZES,
    )


def check_batches(recipe: Recipe, rows: int, scaling: ScalingConfig) -> None:
    """Refuses batches that these workers cannot cut, or that the photographs do not fill."""
    workers = scaling.max_workers
    # Batch normalisation needs two photographs in every piece.
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
    if recipe.sync_batchnorm and not scaling.use_gpu:
        raise UserError(
            "sync_batchnorm works on GPUs only, and this run has none; use --set sync_batchnorm=false"
        )


def _fit(config: dict[str, Any], run: str, scaling: ScalingConfig) -> Result:
    checkpoints = CheckpointConfig(
        num_to_keep=2, checkpoint_score_attribute="val_qwk", checkpoint_score_order="max"
    )
    failures = FailureConfig(max_failures=_MAX_WORKER_FAILURES)
    try:
        return trainer(config, run, scaling, checkpoint_config=checkpoints, failure_config=failures).fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"training in {run} failed {_MAX_WORKER_FAILURES + 1} times, the last time with: {reason}; "
            "SCALP_RAY_LOGS=1 shows the workers' output, and the same command goes on after the last epoch"
        ) from error


@contextmanager
def _progress(epochs: int, tracker: Tracker) -> Iterator[Queue]:
    """A queue for the workers' notes, shown as a bar and one line an epoch."""
    # On the driver's node: on another one it could be lost, and with it every worker that sends a note.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    notes = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    stop = threading.Event()

    def follow() -> None:
        with progress_bar("training", epochs * 100) as (progress, task):
            while not (stop.is_set() and notes.empty()):
                try:
                    note = notes.get(timeout=0.5)
                except Empty:
                    continue
                if "epoch_done" in note:
                    console.print(_epoch_line(note["epoch_done"], epochs))
                    try:
                        tracker.epoch(note["epoch_done"])
                    except UserError as error:  # the curves are no reason to stop a training
                        console.print(f"not tracked: {error}")
                elif "restored" in note:
                    console.print(f"going on after epoch {note['restored']}")
                else:
                    done = (note["epoch"] - 1 + note["step"] / note["steps"]) * 100
                    progress.update(task, completed=int(done), note=f"loss {note['loss']:.3f}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield notes
    finally:
        stop.set()
        thread.join(timeout=10)
        notes.shutdown()


def _epoch_line(entry: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {entry['epoch']}/{epochs}  "
        f"loss {entry['train_loss']:.3f}  top-1 {entry['train_top1']:.3f}  |  validation "
        f"loss {entry['val_loss']:.3f}  top-1 {entry['val_top1']:.3f}  QWK {entry['val_qwk']:.3f}  "
        f"({entry['seconds']:.0f} s, {entry['data_wait_share']:.0%} waiting for data)"
    )


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
