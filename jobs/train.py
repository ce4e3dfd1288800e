"""`scalp train`: data-parallel fine-tuning on Ray, to a calibrated bundle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Dataset, RandomSeedConfig
from ray.data.expressions import random
from ray.train import (
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from cluster.local import Cluster, connect
from jobs.console import SUMMARY_FILE, console, progress_bar, read_json, show, write_json
from jobs.images import LoadForTraining, photographs, turn
from jobs.train_bundle import make_bundle
from jobs.train_loop import train_worker
from scalp_core import manifest, storage
from scalp_core.bundle import serialise_weights
from scalp_core.errors import UserError
from scalp_core.model import initial_model, preprocess_for
from scalp_core.predictor import Device
from scalp_core.preprocess import Preprocess
from scalp_core.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"

_IDENTITY_FILE = "run.json"
_ROWS_A_BLOCK = 64
_MAX_WORKER_FAILURES = 3


def train(
    data: str,
    run: str,
    recipe: Recipe,
    workers: int | None = None,
    device: Device = "auto",
    fold: int | None = None,
) -> dict[str, Any]:
    """Trains a bundle; a run that was stopped goes on from its last epoch, a finished one ends at once.

    Args:
        data: directory that `scalp prepare` wrote.
        run: directory for checkpoints, curves and the bundle, local or `s3://`.
        recipe: what to train and how.
        workers: data-parallel workers; None takes one for each GPU, else two.
        device: auto, cpu or cuda.
        fold: of `scalp prepare --folds`, to validate on; None takes the validation part.

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
    _check_identity(run, identity)
    if summary := read_json(storage.join(run, SUMMARY_FILE)):
        console.print(f"{run} is finished; its bundle is {storage.join(run, 'bundle')}")
        return summary
    model = initial_model(recipe.architecture, recipe.weights, recipe.seed)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    cluster = connect()
    scaling = _scaling(cluster, workers, device)
    count = int(scaling.num_workers)
    _check_batches(recipe, parts["train"].num_rows, count)
    # Everything that a user could have to mend is behind us: from here on the directory is this run's.
    write_json(storage.join(run, _IDENTITY_FILE), identity)
    initial = storage.join(run, "initial.safetensors")
    storage.write(initial, serialise_weights(model.state_dict()))
    console.print(
        f"training {recipe.architecture} on {parts['train'].num_rows} photographs, {count} workers x "
        f"{recipe.batch_size // count} a step = {recipe.batch_size}, weights {recipe.weights}"
    )
    with _progress(recipe.epochs) as notes:
        config = {
            "recipe": recipe.model_dump(),
            "preprocess": spec.model_dump(),
            "initial_weights": initial,
            "train_rows": parts["train"].num_rows,
            "notes": notes,
        }
        result = _fit(config, _datasets(parts, spec, recipe), run, scaling)
    trained = time.monotonic() - started
    summary = make_bundle(run, data_spec, recipe, spec, parts, result, count, device, fold)
    summary["train_seconds"], summary["seconds"] = round(trained, 1), round(time.monotonic() - started, 1)
    write_json(storage.join(run, SUMMARY_FILE), summary)
    _show(summary, run)
    if data_spec.split.warning:
        console.print(data_spec.split.warning)
    return summary


def _check_identity(run: str, identity: dict[str, Any]) -> None:
    """Refuses to go on with a run of other settings or data."""
    known = read_json(storage.join(run, _IDENTITY_FILE)) or identity
    if known != identity:
        old, new = known | known["recipe"], identity | identity["recipe"]
        changed = [name for name in new if name != "recipe" and old.get(name) != new[name]]
        raise UserError(
            f"{run} holds a run with another {', '.join(changed)}; choose another RUN, or remove it"
        )


def _scaling(cluster: Cluster, workers: int | None, device: Device) -> ScalingConfig:
    """Workers that this cluster can hold beside the data pipeline."""
    if device == "cuda" and not cluster.gpus:
        raise UserError(
            "--device cuda: Ray sees no GPU; use --device cpu or auto, or join a cluster that has one"
        )
    use_gpu = device != "cpu" and cluster.gpus > 0
    count = workers or (cluster.gpus if use_gpu else 2)
    # Each worker holds a CPU, and the data pipeline needs at least two to make progress.
    room = min(cluster.gpus, cluster.cpus - 2) if use_gpu else cluster.cpus - 2
    if count > room:
        what = "GPUs" if use_gpu else "CPUs, of which the data pipeline keeps 2"
        have = cluster.gpus if use_gpu else cluster.cpus
        raise UserError(
            f"--workers {count}: Ray has {have} {what}; use --workers {max(1, room)} or a larger cluster"
        )
    return ScalingConfig(
        num_workers=count, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
    )


def _check_batches(recipe: Recipe, rows: int, workers: int) -> None:
    if recipe.batch_size % workers or recipe.batch_size // workers < 2:
        raise UserError(
            f"batch_size {recipe.batch_size} does not divide into 2 or more for each of {workers} workers; "
            f"use --set batch_size={max(2, round(recipe.batch_size / workers)) * workers}"
        )
    if rows < recipe.batch_size:
        raise UserError(
            f"{rows} training photographs do not fill one batch of {recipe.batch_size}; "
            "use --set batch_size=… or more photographs"
        )


def _datasets(parts: dict[str, pa.Table], spec: Preprocess, recipe: Recipe) -> dict[str, Dataset]:
    """Both parts decoded once into Ray's object store; shuffled and turned anew in every epoch."""
    decoded = {name: _decoded(rows, spec) for name, rows in parts.items()}
    # The seed is mixed with the count of executions, so each epoch has an order and turns of its own.
    train = decoded["train"].random_shuffle(seed=RandomSeedConfig(recipe.seed, reseed_after_execution=True))
    if recipe.augment:
        turns = random(seed=recipe.seed + 1, reseed_after_execution=True)
        train = train.with_column("turn", turns).map_batches(
            turn, batch_size=_ROWS_A_BLOCK, zero_copy_batch=True
        )
    return {"train": train, "val": decoded["val"]}


def _decoded(rows: pa.Table, spec: Preprocess) -> Dataset:
    dataset = photographs(rows.select(["uri", "member", "label"]), _ROWS_A_BLOCK)
    return dataset.map_batches(LoadForTraining(spec), batch_size=_ROWS_A_BLOCK).materialize()


class _WholeValidation(DataConfig):
    """Splits the training part equally and the validation part without dropping a row.

    Ray's own equal split drops the rows that do not divide; a metric must not.
    """

    def configure(self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any) -> Any:
        if "val" not in datasets:  # Ray asks for one dataset at a time
            return super().configure(datasets, world_size, *args, **kwargs)
        return [{"val": shard} for shard in datasets["val"].streaming_split(world_size, equal=False)]


def _fit(config: dict[str, Any], datasets: dict[str, Dataset], run: str, scaling: ScalingConfig) -> Result:
    filesystem, path = storage.filesystem(run)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        datasets=datasets,
        dataset_config=_WholeValidation(),
        scaling_config=scaling,
        run_config=RunConfig(
            name="checkpoints",  # in RUN; the same name again restores
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=_MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_qwk", checkpoint_score_order="max"
            ),
        ),
    )
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"training in {run} failed {_MAX_WORKER_FAILURES + 1} times, the last time with: {reason}; "
            "SCALP_RAY_LOGS=1 shows the workers' output, and the same command goes on after the last epoch"
        ) from error


@contextmanager
def _progress(epochs: int) -> Iterator[Queue]:
    """A queue for the workers' notes, shown as a bar and one line an epoch."""
    notes = Queue(actor_options={"num_cpus": 0})
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
