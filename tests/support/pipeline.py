"""One run of synth, prepare, train and evaluate that many tests read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.data.synth import synth
from jobs.evaluate.driver import evaluate
from jobs.train.driver import RECIPES, train
from scalp_core.models.recipe import Recipe, load_recipe
from scalp_core.synthetic.plan import SynthOptions
from tests.support import sockets
from tests.support.metrics import MetricsWatch, Sample
from tests.support.sizes import SMALL

IMAGES, EPOCHS = 160, 4


@dataclass(frozen=True)
class PipelineRun:
    """Folders and summaries of synth, prepare, train and evaluate, and the metrics of the training."""

    photographs: Path
    data: Path
    run: Path
    evaluation: Path
    recipe: Recipe
    prepared: dict[str, Any]
    trained: dict[str, Any]
    evaluated: dict[str, Any]
    metrics: list[Sample]
    listening: set[sockets.Listening]  # while `train` ran


# Without batch normalization, whose statistics are of each worker's own images: the model does not depend on
# the number of workers.
ANY_WORKERS = ("architecture=test_convnext", "learning_rate=1e-3", "weight_decay=0.05")


def shared_run(
    factory: pytest.TempPathFactory, settings: Sequence[str], workers: int | tuple[int, int]
) -> PipelineRun:
    """One run of the pipeline for all test processes; the first that needs it runs it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    pickled = root / "pipeline.pickle"
    with FileLock(root / "pipeline.lock"):
        if not pickled.exists():
            pickled.write_bytes(pickle.dumps(_run_pipeline(root / "pipeline", settings, workers)))
    return pickle.loads(pickled.read_bytes())  # noqa: S301 (these tests wrote it)


def _run_pipeline(root: Path, settings: Sequence[str], workers: int | tuple[int, int]) -> PipelineRun:
    recipe = load_recipe("smoke", RECIPES, [f"size={SMALL}", f"epochs={EPOCHS}", *settings])
    folders = [root / name for name in ("photographs", "data", "way-run", "evaluation")]
    photographs, data, run, evaluation = map(str, folders)
    synth(photographs, SynthOptions(images=IMAGES, seed=3))
    prepared = prepare(photographs, data, executor=LocalExecutor())  # on Ray: tests/with_ray/test_prepare.py
    with MetricsWatch() as watch, sockets.watched() as listening:
        trained = train(data, run, recipe, workers, device="cpu")
        watch.await_total("ray_scalp_train_checkpoints_total", len(trained["history"]), run=folders[2].name)
        evaluated = evaluate(run, data, evaluation)
    return PipelineRun(*folders, recipe, prepared, trained, evaluated, watch.samples, listening)


@dataclass(frozen=True)
class SingleWorkerRun:
    """An undisturbed training with one worker, whose model does not depend on the number of workers."""

    recipe: Recipe
    settings: list[str]
    trained: dict[str, Any]


def train_single_worker(data: Path, run: str, epochs: int, architecture: str) -> SingleWorkerRun:
    """Train with one worker; `architecture` must have no batch normalization."""
    settings = [f"size={SMALL}", f"epochs={epochs}", *ANY_WORKERS, f"architecture={architecture}"]
    recipe = load_recipe("smoke", RECIPES, settings)
    return SingleWorkerRun(recipe, settings, train(str(data), run, recipe, workers=1, device="cpu"))
