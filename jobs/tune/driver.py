"""The driver of `scalp tune`: hyperparameter search with Ray Tune and ASHA on the validation split."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray import tune as ray_tune
from ray.data import Dataset
from ray.train import ScalingConfig
from ray.tune.schedulers import ASHAScheduler

from cluster import ray_internals, reservations
from cluster.local import connect
from cluster.resources import Cluster
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, write_json
from jobs.common.preflight import check_nodes, examples
from jobs.data.tasks import RETRY_TIMEOUT_S
from jobs.train.driver import IDENTITY_FILE, check_batch_norm, check_batches, check_identity
from jobs.train.ingest import ImageSource, cache_budget, cache_images, describe_cache
from jobs.train.scaling import CPUS_FOR_DATA, plan_scaling, wait_for_workers, worker_range
from jobs.tune.results import BEST_FILE, show_trials, write_results
from jobs.tune.trials import Plan, Trial, TrialRecorder, load_trials, make_asha, run_trial, work_folder
from scalp_core import storage
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe
from scalp_core.models.search_space import Space, sample_trials, with_settings
from scalp_core.storage import outputs

if TYPE_CHECKING:
    from jobs.train.initial_state import InitialState

KIND = "tune"
SPACES = Path(__file__).parents[1] / "spaces"

_GRACE_SHARE = 0.25  # share of the epochs before ASHA stops trials


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
    """Train a recipe with sampled settings, stop worse trials early, and save the best recipe.

    A stopped search resumes, a finished one returns immediately. The test split is not used.

    Args:
        data: Directory that `scalp prepare` wrote.
        out: Output directory, local or `s3://`.
        recipe: Recipe with the settings that do not vary.
        space: Search space from `load_space`.
        trials: Number of trials; the first is the unchanged recipe.
        workers: Data-parallel workers per trial.
        device: Device of the workers: auto, cpu or cuda.
        seed: Random seed for sampling trials.

    Returns:
        The summary, which is also written to `out/summary.json`.

    Raises:
        UserError: Invalid input, `out` holds other files or is in use, the machine lacks resources for a
            trial, or all trials failed.
    """
    out, started = storage.absolute(out), time.monotonic()
    outputs.check_output(out, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    splits = {name: manifest.select_split(table, name) for name in ("train", "val")}
    # `draw_seed` samples trials; the seed of training is in the recipe.
    identity = {
        "recipe": recipe.model_dump(), "space": _jsonable(space), "trials": trials, "draw_seed": seed,
        "data_sha256": data_spec.sha256,
    }  # fmt: skip
    check_identity(out, identity, "OUT")
    if summary := _finished(data, out):
        return summary
    manifest.check_random_access(data, table)
    drawn = sample_trials(space, recipe, trials, seed, workers)
    recipes = {
        number: with_settings(recipe, settings, f"trial {number}") for number, settings in enumerate(drawn, 1)
    }
    cluster = wait_for_workers(connect(), (workers, workers), device)
    scaling = plan_scaling(cluster, (workers, workers), device)
    for trial_recipe in recipes.values():
        check_batches(trial_recipe, splits["train"].num_rows, scaling)
    starts = _starts(list(recipes.values()), storage.join(out, outputs.SCRATCH_FOLDER))
    for trial_recipe in recipes.values():
        check_batch_norm(trial_recipe, starts[_start_key(trial_recipe)].batch_norm)
    with outputs.open_output(out, KIND, [data]) as output:
        if summary := _finished(data, out):  # by another process, since the first look
            return summary
        check_nodes(examples(splits), out)
        # All mistakes of a user were checked: only now the directory becomes that of a search.
        write_json(storage.join(out, IDENTITY_FILE), identity)
        known = {trial.number: trial for trial in load_trials(out, drawn)}
        at_once = min(trials, _max_parallel_trials(cluster, scaling))
        grace = max(1, round(recipe.epochs * _GRACE_SHARE))
        for line in _opening(recipe, space, splits, known, cluster, scaling, at_once, grace):
            console.print(line)
        _search(output, recipes, starts, splits, known, cluster, scaling, at_once, grace)
        output.check()
        summary = write_results(out, data_spec, identity, recipes, space, known)
        summary |= {"workers": workers, "at_once": at_once, "seconds": round(time.monotonic() - started, 1)}
        output.remove_scratch()
        write_json(storage.join(out, SUMMARY_FILE), summary)
    show_trials(known)
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


def _jsonable(space: Space) -> dict[str, Any]:
    """Convert a space to the values that JSON preserves."""
    return {
        key: list(values) if isinstance(values, tuple) else values.model_dump()
        for key, values in space.items()
    }


def _next_command(data: str, out: str) -> str:
    return f"train the best recipe with: scalp train {data} RUN --recipe {storage.join(out, BEST_FILE)}"


def _start_key(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size, recipe.resize


def _starts(recipes: list[Recipe], work: str) -> dict[tuple[Any, ...], InitialState]:
    """Make or load the initial states, which trials share; a resumed search downloads nothing."""
    # PyTorch and timm take seconds to import: mistakes that do not need them are reported before.
    from jobs.train.initial_state import load_initial_state, make_initial_state

    by_key = {_start_key(recipe): recipe for recipe in recipes}
    return {
        key: load_initial_state(_start_folder(work, number)) or make_initial_state(recipe)
        for number, (key, recipe) in enumerate(by_key.items())
    }


def _start_folder(work: str, number: int) -> str:
    """Return the folder of an initial state, whose number follows from the identity of the search."""
    return storage.join(work, f"start-{number:03d}")


def _max_parallel_trials(cluster: Cluster, scaling: ScalingConfig) -> int:
    """Compute how many trials fit on the cluster in parallel, with workers and CPUs for data each."""
    by_cpus = cluster.cpus // (scaling.max_workers + CPUS_FOR_DATA)
    by_gpus = cluster.gpus // scaling.max_workers if scaling.use_gpu else by_cpus
    return max(1, min(by_cpus, by_gpus))


def _opening(
    recipe: Recipe,
    space: Space,
    splits: dict[str, pa.Table],
    trials: dict[int, Trial],
    cluster: Cluster,
    scaling: ScalingConfig,
    at_once: int,
    grace: int,
) -> list[str]:
    workers = f"{scaling.max_workers} worker{'s' * (scaling.max_workers > 1)}"
    have = f"{cluster.cpus} CPUs" + f" and {cluster.gpus} GPUs" * scaling.use_gpu
    lines = [
        f"tuning on {splits['train'].num_rows} images, validated on "
        f"{splits['val'].num_rows}: {len(trials)} trials of up to {recipe.epochs} epochs, {at_once} parallel "
        f"({workers} and {CPUS_FOR_DATA} CPUs for data each; Ray has {have})",
        f"varied: {', '.join(space)}; from epoch {grace}, ASHA stops trials that are not in the best third",
    ]
    if finished := sum(trial.is_over for trial in trials.values()):
        lines.append(f"resuming: {finished} of {len(trials)} trials are finished")
    return lines


def _search(
    output: outputs.Output,
    recipes: dict[int, Recipe],
    starts: dict[tuple[Any, ...], InitialState],
    splits: dict[str, pa.Table],
    trials: dict[int, Trial],
    cluster: Cluster,
    scaling: ScalingConfig,
    at_once: int,
    grace: int,
) -> None:
    """Run the unfinished trials, and update their records in place.

    Raises:
        UserError: All trials failed.
    """
    finished, pending = [trial for trial in trials.values() if trial.is_over], _pending_numbers(trials)
    epochs = recipes[1].epochs
    if pending:
        specs = [starts[_start_key(recipes[number])].spec for number in pending]
        images, datasets = _cache_images(specs, splits, cluster)
        work = output.scratch
        pending_recipes = {number: recipes[number] for number in pending}
        plans = _plans(work, pending_recipes, starts, images, trials, scaling, at_once)
        with progress_bar("epochs", epochs * len(trials)) as bar, storage.retry_timeout(RETRY_TIMEOUT_S):
            records = TrialRecorder(output.uri, work, trials, epochs, bar)
            _run(work, plans, records, make_asha(epochs, grace, finished), at_once)
        del datasets  # until here they keep the decoded images in the object store
    if unfinished := sum(trial.status in ("waiting", "running") for trial in trials.values()):
        raise UserError(f"Ray Tune ended with {unfinished} unfinished trials; the same command resumes them")
    if all(trial.status == "failed" for trial in trials.values()):
        raise UserError(
            f"all trials failed, the first with: {trials[1].reason}; SCALP_RAY_LOGS=1 shows the workers' "
            "output, and the same command retries them"
        )


def _pending_numbers(trials: dict[int, Trial]) -> list[int]:
    """List the numbers of unfinished trials, started ones first."""
    pending = [trial for trial in trials.values() if not trial.is_over]
    return [trial.number for trial in sorted(pending, key=lambda trial: (not trial.history, trial.number))]


def _cache_images(
    specs: list[Preprocess], splits: dict[str, pa.Table], cluster: Cluster
) -> tuple[dict[tuple[int, str], dict[str, ImageSource]], list[Dataset | None]]:
    """Decode the images once per size and resize mode; the datasets must stay alive during the search."""
    by_size = {(spec.size, spec.resize): spec for spec in specs}
    budget = cache_budget() // len(by_size)
    images: dict[tuple[int, str], dict[str, ImageSource]] = {}
    datasets = []
    for key, spec in by_size.items():
        val, val_dataset = cache_images(splits["val"], spec, budget // 4)
        train, train_dataset = cache_images(splits["train"], spec, budget * 3 // 4)
        images[key] = {"train": train, "val": val}
        datasets += [val_dataset, train_dataset]
        console.print(f"{spec.size} px: {describe_cache(train, cluster)}")
    return images, datasets


def _plans(
    work: str,
    recipes: dict[int, Recipe],
    starts: dict[tuple[Any, ...], InitialState],
    images: dict[tuple[int, str], dict[str, ImageSource]],
    trials: dict[int, Trial],
    scaling: ScalingConfig,
    at_once: int,
) -> dict[int, Plan]:
    from jobs.train.initial_state import initial_uri, save_initial_state

    weights = {}
    for number, (key, start) in enumerate(starts.items()):
        folder = _start_folder(work, number)
        save_initial_state(folder, start)
        weights[key] = initial_uri(folder)
    plans = {}
    for number, recipe in recipes.items():
        spec = starts[_start_key(recipe)].spec
        # The trials share pixels; mean and standard deviation depend on the architecture.
        sources = {
            split: dataclasses.replace(source, spec=spec)
            for split, source in images[spec.size, spec.resize].items()
        }
        config = {
            "recipe": recipe.model_dump(),
            "grade_counts": np.bincount(sources["train"].labels, minlength=NUM_GRADES).tolist(),
            "initial_weights": weights[_start_key(recipe)],
            "batch_norm": recipe.resolve_batch_norm(worker_range(scaling)[1]),
            "trainings": at_once,
        }
        folder = work_folder(work, trials[number])
        plans[number] = Plan(folder, config | sources, scaling, trials[number].history)
    return plans


def _run(
    work: str,
    plans: dict[int, Plan],
    records: TrialRecorder,
    scheduler: ASHAScheduler,
    at_once: int,
) -> None:
    """Run Ray Tune over the trials, without its own output."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # `TrialRecorder` writes the records
    os.environ.update(ray_internals.TUNE_ENVIRONMENT)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # an interrupt must stop the search immediately
    storage.remove_folder(storage.join(work, "ray"))
    filesystem, path = storage.filesystem(work)
    # The process of a trial needs almost no CPU; Ray Train reserves CPUs for its workers.
    trainable = ray_tune.with_resources(ray_tune.with_parameters(run_trial, plans=plans), {"CPU": 0.01})
    ray_tune.Tuner(
        trainable,
        param_space={"trial": ray_tune.grid_search(list(plans))},
        tune_config=ray_tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:03d}",
        ),
        run_config=ray_tune.RunConfig(
            name="ray", storage_path=path, storage_filesystem=filesystem, callbacks=[records], verbose=0
        ),
    ).fit()
    reservations.remove_orphaned_placement_groups()
