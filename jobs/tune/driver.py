"""`scalp tune`: searches a recipe's settings with Ray Tune and ASHA, on the validation part."""

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
from cluster.local import Cluster, connect
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

_GRACE_SHARE = 0.25  # of the epochs: before, nothing is stopped


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
    """Trains a recipe with drawn settings, stops the worse early, and keeps the best recipe.

    A search that was stopped goes on, a finished one ends at once. The test part is not touched.

    Args:
        data: directory that `scalp prepare` wrote.
        out: directory for what is found, local or `s3://`.
        recipe: what is not varied.
        space: what is, from `load_space`.
        trials: how many; the first is the recipe as it is.
        workers: data-parallel workers of each trial.
        device: auto, cpu or cuda.
        seed: of the draws.

    Returns:
        the summary that is also written to `out/summary.json`.

    Raises:
        UserError: bad input, `out` holds something else or is in use, the machine cannot hold a trial, or
            every trial failed.
    """
    out, started = storage.absolute(out), time.monotonic()
    outputs.check_output(out, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    parts = {name: manifest.select_split(table, name) for name in ("train", "val")}
    # The recipe has a seed of its own.
    identity = {
        "recipe": recipe.model_dump(), "space": _plain(space), "trials": trials, "draw_seed": seed,
        "data_sha256": data_spec.sha256,
    }  # fmt: skip
    check_identity(out, identity, "OUT")
    if summary := _finished(data, out):
        return summary
    drawn = sample_trials(space, recipe, trials, seed, workers)
    recipes = {
        number: with_settings(recipe, settings, f"trial {number}") for number, settings in enumerate(drawn, 1)
    }
    cluster = wait_for_workers(connect(), (workers, workers), device)
    scaling = plan_scaling(cluster, (workers, workers), device)
    for each in recipes.values():
        check_batches(each, parts["train"].num_rows, scaling)
    starts = _starts(list(recipes.values()), storage.join(out, outputs.SCRATCH_FOLDER))
    for each in recipes.values():
        check_batch_norm(each, starts[_start_key(each)].batch_norm)
    with outputs.open_output(out, KIND, [data]) as output:
        if summary := _finished(data, out):  # by another process, since the first look
            return summary
        check_nodes(examples(parts), out)
        # All that a user could have to fix was checked: from here on the directory is this search's.
        write_json(storage.join(out, IDENTITY_FILE), identity)
        known = {trial.number: trial for trial in load_trials(out, drawn)}
        at_once = min(trials, _at_once(cluster, scaling))
        grace = max(1, round(recipe.epochs * _GRACE_SHARE))
        for line in _opening(recipe, space, parts, known, cluster, scaling, at_once, grace):
            console.print(line)
        _search(output, recipes, starts, parts, known, cluster, scaling, at_once, grace)
        output.check()
        summary = write_results(out, data_spec, identity, recipes, space, known)
        summary |= {"workers": workers, "at_once": at_once, "seconds": round(time.monotonic() - started, 1)}
        output.remove_scratch()
        write_json(storage.join(out, SUMMARY_FILE), summary)
    show_trials(known)
    if data_spec.split.warning:
        console.print(data_spec.split.warning)
    console.print(f"trials in {storage.join(out, 'trials.csv')}, pictures in {storage.join(out, 'tune.png')}")
    console.print(_way_on(data, out))
    return summary


def _finished(data: str, out: str) -> dict[str, Any] | None:
    summary = read_json(storage.join(out, SUMMARY_FILE))
    if summary:
        console.print(f"{out} is finished; {_way_on(data, out)}")
    return summary


def _plain(space: Space) -> dict[str, Any]:
    """As it is written to JSON and read again."""
    return {
        key: list(values) if isinstance(values, tuple) else values.model_dump()
        for key, values in space.items()
    }


def _way_on(data: str, out: str) -> str:
    return f"train the best with: scalp train {data} RUN --recipe {storage.join(out, BEST_FILE)}"


def _start_key(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size, recipe.resize


def _starts(recipes: list[Recipe], work: str) -> dict[tuple[Any, ...], InitialState]:
    """First weights and preprocessing, once for all trials that share them; a resumed search fetches none."""
    # PyTorch and timm take seconds: mistakes that need neither are told before.
    from jobs.train.initial_state import load_initial_state, make_initial_state

    different = {_start_key(each): each for each in recipes}
    return {
        key: load_initial_state(_start_folder(work, number)) or make_initial_state(recipe)
        for number, (key, recipe) in enumerate(different.items())
    }


def _start_folder(work: str, number: int) -> str:
    """Where first weights are kept: the recipes of a search, and so the numbers, follow from its identity."""
    return storage.join(work, f"start-{number:03d}")


def _at_once(cluster: Cluster, scaling: ScalingConfig) -> int:
    """How many trials the cluster holds side by side: each has its workers, and CPUs for its photographs."""
    by_cpus = cluster.cpus // (scaling.max_workers + CPUS_FOR_DATA)
    by_gpus = cluster.gpus // scaling.max_workers if scaling.use_gpu else by_cpus
    return max(1, min(by_cpus, by_gpus))


def _opening(
    recipe: Recipe,
    space: Space,
    parts: dict[str, pa.Table],
    trials: dict[int, Trial],
    cluster: Cluster,
    scaling: ScalingConfig,
    at_once: int,
    grace: int,
) -> list[str]:
    workers = f"{scaling.max_workers} worker{'s' * (scaling.max_workers > 1)}"
    have = f"{cluster.cpus} CPUs" + f" and {cluster.gpus} GPUs" * scaling.use_gpu
    lines = [
        f"tuning on {parts['train'].num_rows} photographs, validated on "
        f"{parts['val'].num_rows}: {len(trials)} trials of up to {recipe.epochs} epochs, {at_once} at once "
        f"({workers} and {CPUS_FOR_DATA} CPUs for data each; Ray has {have})",
        f"varied: {', '.join(space)}; from epoch {grace} on, ASHA stops what is not among the best third",
    ]
    if over := sum(trial.is_over for trial in trials.values()):
        lines.append(f"going on: {over} of {len(trials)} trials are over already")
    return lines


def _search(
    output: outputs.Output,
    recipes: dict[int, Recipe],
    starts: dict[tuple[Any, ...], InitialState],
    parts: dict[str, pa.Table],
    trials: dict[int, Trial],
    cluster: Cluster,
    scaling: ScalingConfig,
    at_once: int,
    grace: int,
) -> None:
    """Runs what is not over; the trials' records are changed in place.

    Raises:
        UserError: every trial failed.
    """
    over, left = [each for each in trials.values() if each.is_over], _left(trials)
    epochs = recipes[1].epochs
    if left:
        photographs, kept = _photographs([starts[_start_key(recipes[n])].spec for n in left], parts, cluster)
        work = output.scratch
        plans = _plans(work, {n: recipes[n] for n in left}, starts, photographs, trials, scaling, at_once)
        with progress_bar("epochs", epochs * len(trials)) as bar, storage.retry_timeout(RETRY_TIMEOUT_S):
            records = TrialRecorder(output.uri, work, trials, epochs, bar)
            _run(work, plans, records, make_asha(epochs, grace, over), at_once)
        del kept
    if unfinished := sum(trial.status in ("waiting", "running") for trial in trials.values()):
        raise UserError(f"Ray Tune ended with {unfinished} trials to go; the same command goes on with them")
    if all(trial.status == "failed" for trial in trials.values()):
        raise UserError(
            f"every trial failed, the first with: {trials[1].reason}; SCALP_RAY_LOGS=1 shows the workers' "
            "output, and the same command tries them again"
        )


def _left(trials: dict[int, Trial]) -> list[int]:
    """Those to run, what was begun before first."""
    left = [trial for trial in trials.values() if not trial.is_over]
    return [trial.number for trial in sorted(left, key=lambda trial: (not trial.history, trial.number))]


def _photographs(
    specs: list[Preprocess], parts: dict[str, pa.Table], cluster: Cluster
) -> tuple[dict[tuple[int, str], dict[str, ImageSource]], list[Dataset | None]]:
    """Decoded once for all trials of one size and fit; with the datasets to keep for as long as they run."""
    different = {(spec.size, spec.resize): spec for spec in specs}
    room = cache_budget() // len(different)
    found: dict[tuple[int, str], dict[str, ImageSource]] = {}
    kept = []
    for key, spec in different.items():
        val, kept_val = cache_images(parts["val"], spec, room // 4)
        train, kept_train = cache_images(parts["train"], spec, room * 3 // 4)
        found[key] = {"train": train, "val": val}
        kept += [kept_val, kept_train]
        console.print(f"{spec.size} px: {describe_cache(train, cluster)}")
    return found, kept


def _plans(
    work: str,
    recipes: dict[int, Recipe],
    starts: dict[tuple[Any, ...], InitialState],
    photographs: dict[tuple[int, str], dict[str, ImageSource]],
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
        # Mean and deviation are the architecture's own; the pixels are shared.
        own = {
            part: dataclasses.replace(source, spec=spec)
            for part, source in photographs[spec.size, spec.resize].items()
        }
        config = {
            "recipe": recipe.model_dump(),
            "grade_counts": np.bincount(own["train"].labels, minlength=NUM_GRADES).tolist(),
            "initial_weights": weights[_start_key(recipe)],
            "batch_norm": recipe.resolve_batch_norm(worker_range(scaling)[1]),
            "trainings": at_once,
        }
        folder = work_folder(work, trials[number])
        plans[number] = Plan(folder, config | own, scaling, trials[number].history)
    return plans


def _run(
    work: str,
    plans: dict[int, Plan],
    records: TrialRecorder,
    scheduler: ASHAScheduler,
    at_once: int,
) -> None:
    """Ray Tune over the trials, without a word of its own."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the records are ours
    os.environ.update(ray_internals.TUNE_ENVIRONMENT)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # who interrupts is obeyed at once
    storage.remove_folder(storage.join(work, "ray"))
    filesystem, path = storage.filesystem(work)
    # A trial's own process holds no CPU worth the name: its workers do, which Ray Train asks for.
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
