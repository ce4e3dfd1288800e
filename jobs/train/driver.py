"""The driver of `scalp train`: data-parallel fine-tuning on Ray, which produces a calibrated bundle."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from joblib import cpu_count
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    ScalingConfig,
    TrainingFailedError,
)
from ray.util.queue import Queue

from cluster.local import connect
from cluster.resources import Cluster
from jobs.common.console import SUMMARY_FILE, console, read_json, show, write_json
from jobs.common.executor import Executor, needs_ray
from jobs.common.local_executor import LocalExecutor
from jobs.common.preflight import check_nodes, examples
from jobs.common.ray_executor import RayExecutor
from jobs.train.ingest import ImageSource, cache_budget, cache_splits, describe_cache, select_splits
from jobs.train.progress import ControllerCallback, follow_progress
from jobs.train.scaling import (
    ElasticScaling,
    batch_norm_line,
    check_batches,
    plan_scaling,
    wait_for_workers,
    worker_range,
)
from jobs.train.tracking import Tracking, open_tracker, tolerate_errors
from scalp_core import storage
from scalp_core.bundles.contract import Teachers
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.inference.predictor import Device, resolve_device
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import images_per_epoch
from scalp_core.settings import rename_old_keys
from scalp_core.storage import outputs

if TYPE_CHECKING:
    from jobs.train.initial_state import InitialState  # imports PyTorch

RECIPES = Path(__file__).parents[1] / "recipes"

KIND = "train"
IDENTITY_FILE = "run.json"
# Settings that recipes of older runs lack, with the values by which they train.
_LATER_SETTINGS = {"symptoms": "one"}
_MAX_WORKER_FAILURES = 3
_CHECKPOINTS = CheckpointConfig(
    num_to_keep=2, checkpoint_score_attribute="val_qwk", checkpoint_score_order="max"
)
_LONGEST_VALUE = 40  # characters of a setting in a message
# Ray detects a lost node up to 20 s late. An elastic run waits this long for resources on it before it counts
# the nodes again.
_START_TIMEOUT_S = 10
# Seconds between Ray's requests for results. Ray's default of 2 s delays the end of each epoch and run.
_POLL_S = 0.5


class SoftLabels(NamedTuple):
    """Labels of a training that are distributions over the grades.

    Args:
        teachers: Models that gave the distributions, for the record.
        by_image: Distribution, float32 (4,), by `image_id`.
    """

    teachers: Teachers
    by_image: dict[str, np.ndarray]

    def of(self, rows: pa.Table) -> np.ndarray:
        """Soft labels of manifest rows, float32 (N, 4); rows with a soft label of readers keep it."""
        labels = zip(rows["image_id"].to_pylist(), rows["soft_label"].to_pylist(), strict=True)
        return np.array([soft or self.by_image[image_id] for image_id, soft in labels], np.float32)


@dataclass(frozen=True)
class Shared:
    """State that the trainings of one command share, in threads of the driver, one or more at a time.

    Args:
        start: Initial state of all trainings; None: each makes its own.
        cluster: Resources of the cluster, and the workers of each training; None: each plans its own.
        scaling: Workers of each training.
        at_once: Number of trainings that run in parallel.
    """

    start: InitialState | None = None
    cluster: Cluster | None = None
    scaling: ScalingConfig | None = None
    at_once: int = 1
    # A training holds it except while its workers train: Matplotlib and PyTorch's random numbers are of the
    # process, and two calibrations at a time would wait for each other's CPUs.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Let other trainings prepare and finalize during the block."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()


def train(
    data: str,
    run: str,
    recipe: Recipe,
    workers: tuple[int, int] | int | None = None,
    device: Device = "auto",
    fold: int | None = None,
    tracking: Tracking = "tensorboard",
    hold_out_val: bool = False,
    soft_labels: SoftLabels | None = None,
    shared: Shared | None = None,
    local: bool | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a bundle. A stopped run resumes after its last epoch; a finished one returns immediately.

    Args:
        data: Directory that `scalp prepare` wrote.
        run: Run directory for checkpoints, curves and the bundle, local or `s3://`.
        recipe: Training recipe.
        workers: Number of data-parallel workers, or minimum and maximum for an elastic run; None: one per
            GPU, or one on CPUs.
        device: Device of the workers: auto, cpu or cuda.
        fold: Fold of `scalp prepare --folds` to validate on; None: the validation split.
        tracking: Additional destination of the metrics: TensorBoard files in `run`, or an MLflow server.
        hold_out_val: With `fold`, whether training omits the images of the val split in other folds.
        soft_labels: Labels of the training images to learn instead of their grades.
        shared: State that this training shares with others, in other threads; lines of its output begin
            with the name of `run`.
        local: Whether to train in this process; None: as `fits_here` decides.
        progress: Called after each checkpoint of a training in this process.

    Returns:
        The summary, which is also written to `run/summary.json`.

    Raises:
        UserError: Invalid input, `run` holds other files or is in use, the machine lacks resources for the
            workers, or MLflow does not answer.
    """
    if shared is None:
        shared, label = Shared(), ""
    else:
        label = f"{Path(run).name}: "
    with shared.lock:
        return _train(
            data,
            run,
            recipe,
            (workers, workers) if isinstance(workers, int) else workers,
            device,
            fold,
            tracking,
            hold_out_val,
            soft_labels,
            shared,
            label,
            fits_here(workers, device) if local is None else local,
            progress,
        )


def fits_here(workers: tuple[int, int] | int | None, device: Device) -> bool:
    """Whether a training runs in this process by default: it has one worker, and nothing needs Ray."""
    return workers in (None, 1, (1, 1)) and not needs_ray(device)


def _train(
    data: str,
    run: str,
    recipe: Recipe,
    workers: tuple[int, int] | None,
    device: Device,
    fold: int | None,
    tracking: Tracking,
    hold_out_val: bool,
    soft_labels: SoftLabels | None,
    shared: Shared,
    label: str,
    here: bool,
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Train as `train` does, while `shared.lock` is held."""
    run, started = storage.absolute(run), time.monotonic()
    outputs.check_output(run, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if fold is not None:
        table = manifest.apply_fold(table, fold, hold_out_val)
    splits = select_splits(table, data_spec, recipe)
    identity = identify(recipe, data_spec, fold, hold_out_val)
    if soft_labels:
        identity["teachers"] = list(soft_labels.teachers.models)
    check_identity(run, identity)
    if summary := _finished(run):
        return summary
    # PyTorch and timm take seconds to import: the mistakes above are reported before.
    from jobs.train.initial_state import (
        initial_uri,
        load_initial_state,
        make_initial_state,
        save_initial_state,
    )

    saved = load_initial_state(run)
    start = saved or shared.start or make_initial_state(recipe)
    check_batch_norm(recipe, start.batch_norm)
    executor: Executor
    if here:
        executor, nodes = LocalExecutor(cpu_count(), gpus=int(resolve_device(device) == "cuda")), 1
        scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": cpu_count()})
    else:
        cluster = shared.cluster or wait_for_workers(connect(), workers, device)
        executor, nodes = RayExecutor(), cluster.nodes
        scaling = shared.scaling or plan_scaling(cluster, workers, device, all_cores=True)
    check_batches(recipe, splits["train"].num_rows, scaling)
    if not here:
        check_nodes(examples(splits), run)
    tracked_identity = identity | {"synthetic": data_spec.synthetic}
    with (
        outputs.open_output(run, KIND, [data]) as output,
        open_tracker(tracking, run, tracked_identity) as tracker,
    ):
        if summary := _finished(run):  # by another process, since the first look
            return summary
        # All mistakes of a user were checked: only now the directory becomes a run directory.
        write_json(storage.join(run, IDENTITY_FILE), identity)
        if not saved:
            save_initial_state(run, start)
        lines = [_opening(recipe, splits["train"].num_rows, scaling)]
        if start.batch_norm:
            lines.append(batch_norm_line(recipe, scaling))
        for line in (*lines, f"initial weights: {start.record}", *start.notes):
            console.print(f"{label}{line}")
        budget = cache_budget(in_ray=not here) // shared.at_once
        images, datasets = cache_splits(splits, start.spec, budget, in_ray=not here)
        console.print(f"{label}{describe_cache(images['train'], nodes)}")
        if soft_labels:
            learned = dataclasses.replace(images["train"], soft_labels=soft_labels.of(splits["train"]))
            images |= {"train": learned}
        config = worker_config(recipe, images, initial_uri(run), scaling) | {"trainings": shared.at_once}
        with shared.unlocked():
            fewest, as_lines = scaling.min_workers, shared.at_once > 1
            with follow_progress(run, recipe, tracker, fewest, label, as_lines, here) as notes:
                if here:
                    config |= {"device": resolve_device(device)}
                    result = _fit_here(config | {"notes": notes}, run, notes, progress)
                else:
                    result = _fit(config | {"notes": notes}, run, scaling, notes)
        _check_divergence(run, result)
        del images, config, datasets  # until here they keep the decoded images in the object store
        trained = time.monotonic() - started
        output.check()
        from jobs.train.finalize import make_bundle

        teachers = soft_labels.teachers if soft_labels else None
        summary = make_bundle(run, data_spec, recipe, start, splits, result, device, fold, teachers, executor)
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
    workers = f"{fewest} to {most} workers" if fewest != most else f"{most} worker{'s' if most > 1 else ''}"
    rank_batches = sorted({recipe.batch_size // most, -(-recipe.batch_size // fewest)})
    return (
        f"training {recipe.architecture} on {rows} images: {workers} "
        f"x {' to '.join(map(str, rank_batches))} images per step = {recipe.batch_size}, "
        f"{images_per_epoch(rows, recipe.augment) // recipe.batch_size} steps per epoch; learning rate "
        f"{recipe.learning_rate:g}, for any number of workers"
    )


def worker_config(
    recipe: Recipe, images: dict[str, ImageSource], initial: str, scaling: ScalingConfig
) -> dict[str, Any]:
    """Make the configuration of `train_worker`.

    Args:
        recipe: Training recipe.
        images: Images by split, `train` and `val`.
        initial: URI of the initial weights.
        scaling: Workers of the training.
    """
    others = images["train"].other_labels
    return {
        "recipe": recipe.model_dump(),
        **images,
        "grade_counts": count_grades(images["train"].labels),
        "other_counts": [] if others is None else [count_grades(labels) for labels in others.T],
        "initial_weights": initial,
        "batch_norm": recipe.resolve_batch_norm(worker_range(scaling)[1]),
        "worker_cpus": scaling.resources_per_worker["CPU"],
    }


def count_grades(labels: np.ndarray) -> list[int]:
    """Count the images per grade of labels int (N,), in which -1 is not a label."""
    return np.bincount(labels[labels >= 0], minlength=NUM_GRADES).tolist()


def identify(
    recipe: Recipe, data_spec: DataSpec, fold: int | None, hold_out_val: bool = False
) -> dict[str, Any]:
    """Settings and data of a training, which `check_identity` compares."""
    identity = {"recipe": recipe.model_dump(), **identify_labels(recipe, data_spec), "fold": fold}
    return identity | ({"hold_out_val": True} if hold_out_val else {})  # which older runs do not have


def identify_labels(recipe: Recipe, data_spec: DataSpec) -> dict[str, Any]:
    """Hashes of the labels that a training learns: `data_sha256`, and `labels_sha256` of other symptoms."""
    hashes = {"data_sha256": data_spec.sha256}
    return hashes | ({"labels_sha256": data_spec.labels_sha256} if recipe.symptoms == "all" else {})


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
    known["recipe"] = _LATER_SETTINGS | known["recipe"]
    if known != identity:
        old, new = known | known["recipe"], identity | identity["recipe"]
        differences = [
            _difference(name, old.get(name), new.get(name))
            for name in new | old
            if name != "recipe" and old.get(name) != new.get(name)
        ]
        raise UserError(
            f"{run} holds a run with {', '.join(differences)}; choose another {argument}, or resume with the "
            f"settings in its {IDENTITY_FILE}"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    """Describe a setting that differs: both values, or the name alone of a hash or a search space."""
    if max(len(str(old)), len(str(new))) > _LONGEST_VALUE:
        return f"another {name}"
    return f"{name} {old} (now {new})"


def check_batch_norm(recipe: Recipe, has_batch_norm: bool) -> None:
    """Check that the architecture has batch normalization if the recipe configures it.

    Raises:
        UserError: The setting would have no effect.
    """
    if recipe.batch_norm in ("sync", "frozen") and not has_batch_norm:
        raise UserError(
            f"batch_norm ({recipe.batch_norm}) has no effect with architecture: {recipe.architecture}, which "
            "has no batch normalization; use batch_norm=auto, or another architecture"
        )


def _fit_here(config: dict[str, Any], run: str, notes: Any, progress: Callable[[], None]) -> Result:
    from jobs.train.trainer import train_here

    return train_here(config, run, _CHECKPOINTS, notes, progress)


def _fit(config: dict[str, Any], run: str, scaling: ScalingConfig, notes: Queue) -> Result:
    from jobs.train.trainer import make_trainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    if isinstance(scaling, ElasticScaling):
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    failures = FailureConfig(max_failures=_MAX_WORKER_FAILURES)
    try:
        result = make_trainer(
            config,
            run,
            scaling,
            callbacks=[ControllerCallback(notes)],
            checkpoint_config=_CHECKPOINTS,
            failure_config=failures,
        ).fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"training in {run} failed {_MAX_WORKER_FAILURES + 1} times, the last time with: {reason}; "
            "SCALP_RAY_LOGS=1 shows the workers' output, and the same command resumes after the last epoch"
        ) from error
    return result


def _check_divergence(run: str, result: Result) -> None:
    """Check that a training ended with a loss that is finite.

    Raises:
        UserError: It did not.
    """
    from jobs.train.trainer import divergence_message

    if divergence := divergence_message(result):
        raise UserError(f"training in {run} stopped: {divergence}; choose another RUN")


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
