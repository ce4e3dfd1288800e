"""The driver of `scalp tune`: hyperparameter search with TPE and ASHA on the validation split."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import Dataset
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import Progress, TaskID

from cluster.local import connect
from cluster.resources import Cluster
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, write_json
from jobs.common.preflight import check_nodes, examples
from jobs.data.tasks import RETRY_TIMEOUT_S
from jobs.train.driver import (
    IDENTITY_FILE,
    check_batch_norm,
    check_identity,
    identify_labels,
    worker_config,
)
from jobs.train.ingest import ImageSource, cache_budget, cache_splits, describe_cache, select_splits
from jobs.train.scaling import (
    CPUS_FOR_DATA,
    check_batches,
    count_parallel,
    plan_scaling,
    wait_for_workers,
)
from jobs.tune.proposals import plan_trials
from jobs.tune.results import BEST_FILE, format_settings, show_trials, write_results
from jobs.tune.search import Search
from jobs.tune.trials import METRIC, Trial, first_rung, load_trials
from scalp_core import storage
from scalp_core.bundles.bundle import sha256
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe
from scalp_core.models.search_space import Range, Space, with_settings
from scalp_core.storage import outputs

if TYPE_CHECKING:
    from jobs.train.initial_state import InitialState

KIND = "tune"
SPACES = Path(__file__).parents[1] / "spaces"

# Fewer than in a training, because invalid settings fail repeatedly.
_MAX_WORKER_FAILURES = 1
_POLL_S = 1.0


def tune(
    data: str,
    out: str,
    recipe: Recipe,
    space: Space,
    trials: int = 16,
    workers: int = 1,
    device: Device = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Train a recipe with proposed settings, stop worse trials early, and save the best recipe.

    A stopped search resumes, a finished one returns immediately. The test split is not used.

    Args:
        data: Directory that `scalp prepare` wrote.
        out: Output directory, local or `s3://`.
        recipe: Recipe with the settings that do not vary.
        space: Search space from `load_space`.
        trials: Number of trials; the first is the unchanged recipe.
        workers: Data-parallel workers per trial.
        device: Device of the workers: auto, cpu or cuda.
        seed: Random seed for proposing trials.

    Returns:
        The summary, which is also written to `out/summary.json`.

    Raises:
        UserError: Invalid input, `out` holds other files or is in use, the machine lacks resources for a
            trial, or all trials failed.
    """
    out, started = storage.absolute(out), time.monotonic()
    outputs.check_output(out, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    splits = select_splits(table, data_spec, recipe)
    # `draw_seed` proposes trials; the seed of training is in the recipe.
    identity = {
        "recipe": recipe.model_dump(),
        "space": json.loads(json.dumps(space, default=Range.model_dump)),  # as JSON preserves it
        "trials": trials,
        "draw_seed": seed,
        **identify_labels(recipe, data_spec),
    }
    check_identity(out, identity, "OUT")
    if summary := _finished(data, out):
        return summary
    planned = [
        with_settings(recipe, trial.settings, f"trial {trial.number}")
        for trial in plan_trials(space, recipe, trials, workers, seed)
    ]
    cluster = wait_for_workers(connect(), (workers, workers), device)
    scaling = plan_scaling(cluster, (workers, workers), device)
    for trial_recipe in planned:
        check_batches(trial_recipe, splits["train"].num_rows, scaling)
    at_once = min(trials, count_parallel(cluster, scaling))
    inputs = _Inputs(storage.join(out, outputs.SCRATCH_FOLDER), splits, planned, cluster, scaling, at_once)
    for trial_recipe in planned:
        check_batch_norm(trial_recipe, inputs.initial_state(trial_recipe).batch_norm)
    check_nodes(examples(splits), out)
    with outputs.open_output(out, KIND, [data]) as output:
        if summary := _finished(data, out):  # by another process, since the first look
            return summary
        # All mistakes of a user were checked: only now the directory becomes that of a search.
        write_json(storage.join(out, IDENTITY_FILE), identity)
        workers_text = f"{workers} worker{'s' * (workers > 1)}"
        have = f"{cluster.cpus} CPUs" + f" and {cluster.gpus} GPUs" * scaling.use_gpu
        console.print(
            f"tuning on {splits['train'].num_rows} images, validated on {splits['val'].num_rows}: {trials} "
            f"trials of up to {recipe.epochs} epochs, {at_once} parallel ({workers_text} and {CPUS_FOR_DATA} "
            f"CPUs for data each; Ray has {have})"
        )
        console.print(
            f"varied: {', '.join(space)}; from epoch {first_rung(recipe.epochs)}, ASHA stops trials that are "
            "not in the best third"
        )
        if finished := sum(trial.is_over for trial in load_trials(out, trials)):
            console.print(f"resuming: {finished} of {trials} trials are finished")
        outputs.scratch(out)  # creates it, with the marker by which it may be removed
        search = _start_search(out, space, recipe, trials, workers, seed)
        tried = _run_trials(search, recipe, trials, inputs, at_once)
        output.check()
        summary = write_results(out, data_spec, identity, recipe, space, tried)
        summary |= {"workers": workers, "at_once": at_once, "seconds": round(time.monotonic() - started, 1)}
        output.remove_scratch()
        write_json(storage.join(out, SUMMARY_FILE), summary)
    show_trials(tried)
    if data_spec.split.warning:
        console.print(data_spec.split.warning)
    console.print(f"trials: {storage.join(out, 'trials.csv')}, plots: {storage.join(out, 'tune.png')}")
    console.print(_next_command(data, out))
    return summary


def _finished(data: str, out: str) -> dict[str, Any] | None:
    summary = read_json(storage.join(out, SUMMARY_FILE))
    if summary:
        console.print(f"{out} is finished; {_next_command(data, out)}")
    return summary


def _next_command(data: str, out: str) -> str:
    return f"train the best recipe with: scalp train {data} RUN --recipe {storage.join(out, BEST_FILE)}"


class _Inputs:
    """Initial states and decoded images, which trials share; each is made when a trial needs it first."""

    def __init__(
        self,
        work: str,
        splits: dict[str, pa.Table],
        planned: list[Recipe],
        cluster: Cluster,
        scaling: ScalingConfig,
        at_once: int,
    ) -> None:
        self.work = work
        self.scaling = scaling
        self._splits = splits
        self._sizes = len({(recipe.size, recipe.resize) for recipe in planned})
        self._cluster = cluster
        self._at_once = at_once
        self._lock = threading.Lock()  # trials run in threads
        self._states: dict[str, InitialState] = {}
        self._images: dict[tuple[int, str], dict[str, ImageSource]] = {}
        self._datasets: list[Dataset | None] = []  # keep the decoded images in the object store

    def initial_state(self, recipe: Recipe) -> InitialState:
        """Make or load the initial state of a recipe; a resumed search downloads nothing."""
        # PyTorch and timm take seconds to import: mistakes that do not need them are reported before.
        from jobs.train.initial_state import load_initial_state, make_initial_state

        folder = self.initial_folder(recipe)
        if folder not in self._states:
            self._states[folder] = load_initial_state(folder) or make_initial_state(recipe)
        return self._states[folder]

    def initial_folder(self, recipe: Recipe) -> str:
        """Return the folder of an initial state, which recipes share if they need the same one."""
        fields = {"architecture", "weights", "seed", "loss", "size", "resize", "model", "symptoms"}
        key = recipe.model_dump(include=fields) | {"loss": recipe.head}
        return storage.join(self.work, f"start-{sha256(json.dumps(key).encode())[:16]}")

    def config(self, recipe: Recipe) -> dict[str, Any]:
        """Make the configuration of `train_worker`.

        Raises:
            UserError: The initial weights do not fit the recipe.
        """
        from jobs.train.initial_state import initial_uri, load_initial_state, save_initial_state

        folder = self.initial_folder(recipe)
        with self._lock:
            state = self.initial_state(recipe)
            if not load_initial_state(folder):
                save_initial_state(folder, state)
            images = self._decode(state.spec)
        # The trials share pixels; mean and standard deviation depend on the architecture.
        sources = {split: dataclasses.replace(source, spec=state.spec) for split, source in images.items()}
        return worker_config(recipe, sources, initial_uri(folder), self.scaling) | {
            "trainings": self._at_once
        }

    def _decode(self, spec: Preprocess) -> dict[str, ImageSource]:
        """Decode the images once per size and resize mode."""
        key = spec.size, spec.resize
        if key not in self._images:
            images, datasets = cache_splits(self._splits, spec, cache_budget() // self._sizes)
            self._images[key] = images
            self._datasets += datasets
            console.print(f"{spec.size} px: {describe_cache(images['train'], self._cluster.nodes)}")
        return self._images[key]


def _start_search(
    out: str, space: Space, recipe: Recipe, trials: int, workers: int, seed: int
) -> ActorHandle:
    """Start the process of a search, on this node: if another node with it is lost, all trials fail."""
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Search).options(num_cpus=0, scheduling_strategy=on_this_node)
    return actor.remote(out, space, recipe, trials, workers, seed)


def _run_trials(
    search: ActorHandle, recipe: Recipe, count: int, inputs: _Inputs, at_once: int
) -> list[Trial]:
    """Run the unfinished trials, and return all trials.

    Raises:
        UserError: All trials failed.
    """
    running: dict[int, AsyncResult[str | None]] = {}
    with (
        ThreadPool(at_once) as pool,  # of daemons: an interrupt does not wait for their trials
        progress_bar("epochs", recipe.epochs * count) as bar,
        storage.retry_timeout(RETRY_TIMEOUT_S),
    ):
        while True:
            while len(running) < at_once and (trial := ray.get(search.start_next.remote())):
                running[trial.number] = pool.apply_async(_train, (search, trial, recipe, inputs))
            _show_progress(bar, ray.get(search.trials.remote()), recipe.epochs)
            if not running:
                break
            time.sleep(_POLL_S)
            for number in [number for number, result in running.items() if result.ready()]:
                failure = running.pop(number).get()
                _print_end(ray.get(search.end.remote(number, failure)), recipe.epochs)
    trials = ray.get(search.trials.remote())
    if all(trial.status == "failed" for trial in trials):
        raise UserError(
            f"all trials failed, the first with: {trials[0].reason}; SCALP_RAY_LOGS=1 shows the workers' "
            "output, and the same command retries them"
        )
    return trials


def _train(search: ActorHandle, trial: Trial, base: Recipe, inputs: _Inputs) -> str | None:
    """Train a trial from its last checkpoint, and return the reason if it failed, in one line."""
    # Imports PyTorch.
    from jobs.train.trainer import divergence_message, make_trainer

    def after_epoch(entry: dict[str, Any]) -> bool:
        return ray.get(search.add_epoch.remote(trial.number, entry))

    folder = storage.join(inputs.work, f"{trial.number:03d}")
    try:
        config = inputs.config(with_settings(base, trial.settings, f"trial {trial.number}"))
        training = make_trainer(
            config | {"after_epoch": after_epoch},
            folder,
            inputs.scaling,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=_MAX_WORKER_FAILURES),
        )
        failure = divergence_message(training.fit())
    except TrainingFailedError as error:
        return str(error).strip().splitlines()[-1]
    except UserError as error:
        return str(error)
    if not failure:
        storage.remove_folder(folder)
    return failure


def _print_end(trial: Trial, epochs: int) -> None:
    settings = format_settings(trial.settings)
    if trial.best is None or trial.status == "failed":
        console.print(f"trial {trial.number} failed: {trial.reason}  ({settings})")
        return
    console.print(
        f"trial {trial.number} {trial.status} after epoch {trial.history[-1]['epoch']}/{epochs}: "
        f"QWK {trial.best[METRIC]:.3f}  ({settings})"
    )


def _show_progress(bar: tuple[Progress, TaskID], trials: list[Trial], epochs: int) -> None:
    progress, task = bar
    ended = [trial.is_over or trial.status == "failed" for trial in trials]
    done = sum(epochs if over else len(trial.history) for trial, over in zip(trials, ended, strict=True))
    running = sum(trial.status == "running" for trial in trials)
    best = max((trial.best[METRIC] for trial in trials if trial.best), default=None)
    note = f"{running} running" + (f", best QWK {best:.3f}" if best is not None else "")
    progress.update(task, completed=done, note=note)
