"""`transfer`: fine-tune ImageNet weights, and train from scratch, on few and on many images."""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import console, progress_bar
from jobs.common.images import LoadForTraining, select_locations, without_nulls
from jobs.data.prepare import prepare
from jobs.train.driver import RECIPES
from jobs.train.ingest import ImageSource, _LoadRankBatch
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, metrics
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.predictor import has_bf16
from scalp_core.models.architecture import normalize, preprocess_for, to_channels_last
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.losses import make_losses
from scalp_core.models.recipe import Recipe, load_recipe
from scalp_core.models.sampler import RankBatch
from scalp_core.models.training_step import TrainingStep
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

_RECIPE = "cpu"
# From scratch, no layer is better than another.
_FROM_SCRATCH = {"weights": "none", "frozen_epochs": 0, "layer_decay": 1.0}
_BATCH = 64  # of the test


@dataclass(frozen=True)
class TransferOptions:
    """Options of `transfer`.

    Args:
        counts: Numbers of training images.
        photographs: Number of synthetic images, of which 70 % are for training and 10 % for the test.
        steps: Steps of each training.
        seeds: Number of repetitions, with other initial weights, images and order.
        settings: Changes of the recipe, as `key=value`.
    """

    counts: tuple[int, ...] = (200, 500, 2000)
    photographs: int = 3600
    steps: int = 375
    seeds: int = 1
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """Decoded images of a split, as `ingest.ImageSource` provides them."""

    pixels: np.ndarray
    labels: np.ndarray
    groups: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels[rows]

    def labels_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"label": self.labels[rows]}

    def take(self, rows: np.ndarray) -> Images:
        return Images(self.pixels[rows], self.labels[rows], [self.groups[row] for row in rows])


def bench_transfer(out: str, options: TransferOptions) -> dict[str, Any]:
    """Train on the first images of a random order, and test on microscopes that were not in training.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The training split has fewer images than `counts` names.
    """
    tuned = load_recipe(_RECIPE, RECIPES, list(options.settings))
    recipes = {tuned.weights: tuned, "none": Recipe(**tuned.model_dump() | _FROM_SCRATCH)}
    splits = make_splits(options.photographs, preprocess_for(_model(tuned)[0], tuned.size, tuned.resize))
    train = splits["train"]
    if len(train) < max(options.counts):
        raise UserError(f"the training split has {len(train)} images; use more --photographs")
    rows = []
    turns = list(itertools.product(range(options.seeds), options.counts, recipes))
    with progress_bar("training", len(turns)) as (progress, task):
        for seed, count, name in turns:
            progress.update(task, note=f"{count} images, weights: {name}")
            chosen = train.take(np.random.default_rng(seed).permutation(len(train))[:count])
            recipe = recipes[name].model_copy(update={"seed": seed})
            row = _train_and_test(recipe, chosen, splits["test"], options.steps)
            rows.append({"images": count, "weights": name, "seed": seed} | row)
            progress.update(task, advance=1)
    settings = vars(options) | {
        "test_images": len(splits["test"]),
        "test_groups": len(set(splits["test"].groups)),
        "training_groups": len(set(train.groups)),
        "recipes": {name: recipe.model_dump() for name, recipe in recipes.items()},
    }
    result = write_result(out, "transfer", settings, rows, {})
    _show(rows)
    return result


def make_splits(photographs: int, spec: Preprocess) -> dict[str, Images]:
    """Draw synthetic images, and decode them by split; no microscope is in two splits."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "data"))
        with console.status("generating images"):
            write_dataset(Path(folder, "photographs"), SynthOptions(images=photographs))
        own = OwnProcess()  # whose Ray ends with it
        own.call(prepare, str(Path(folder, "photographs")), data)
        own.close()
        table = manifest.read_manifest(data)
        return {name: _decode(manifest.select_split(table, name), spec) for name in manifest.SPLITS}


def _decode(rows: pa.Table, spec: Preprocess) -> Images:
    located = without_nulls(select_locations(rows, "label"))
    columns = {name: located[name].to_numpy(zero_copy_only=False) for name in located.column_names}
    loaded = LoadForTraining(spec)(columns)
    return Images(loaded["image"], loaded["label"].astype(np.int8), rows["group"].to_pylist())


def _model(recipe: Recipe) -> tuple[torch.nn.Module, Any]:
    return initial_model(
        recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size, recipe.model
    )


def _train_and_test(recipe: Recipe, train: Images, test: Images, steps: int) -> dict[str, Any]:
    """Train, and test the last weights."""
    started = time.monotonic()
    step, spec, _ = train_alone(recipe, train, steps)
    seconds = time.monotonic() - started
    grades = _grade(step, test.pixels, spec)
    bounds = bootstrap.bootstrap_grades(test.labels, grades, test.groups)
    scored = metrics.score(test.labels, grades)
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        **{name: round(scored[name], 4) for name in ("qwk", "top1")},
        "qwk_interval": [round(bounds["qwk"][end], 4) for end in ("low", "high")],
    }


def train_alone(
    recipe: Recipe, train: Images | ImageSource, steps: int
) -> tuple[TrainingStep, Preprocess, list[float]]:
    """Train as a worker of `scalp train` does, without Ray.

    Args:
        recipe: Recipe; `weights` may be a file of an earlier training.
        train: Training images.
        steps: Steps of the training.

    Returns:
        The training step with the model, its preprocessing, and the loss of each step.
    """
    model, _ = _model(recipe)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    counts = np.bincount(train.labels, minlength=NUM_GRADES).tolist()
    losses = make_losses(recipe.loss, recipe.label_smoothing, counts, recipe.softness)
    norm = recipe.resolve_batch_norm(1)
    step = TrainingStep(to_channels_last(model), recipe, losses, spec, steps, norm, has_bf16("cpu"))
    step.start_average()
    load = _LoadRankBatch(train, recipe.epoch_settings, RankBatch(0, 1, recipe.batch_size), 1)  # type: ignore[arg-type]
    values: list[torch.Tensor] = []
    frozen = steps * recipe.frozen_epochs // recipe.epochs  # as `Recipe.learning_rate_factor` counts them
    for number in range(steps):
        if number in (0, frozen):
            step.wrap(frozen=number < frozen)
            step.train_mode()
        batch = load({"id": np.arange(recipe.batch_size) + number * recipe.batch_size})
        sums = step(torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"]).long())
        values.append(sums[0])
    return step, spec, [float(value) for value in values]


def _grade(step: TrainingStep, pixels: np.ndarray, spec: Preprocess) -> np.ndarray:
    model = step.evaluated_model.eval()
    with torch.inference_mode(), step.autocast():
        batches = torch.from_numpy(pixels).split(_BATCH)
        return torch.cat([model(normalize(batch, spec)).argmax(1) for batch in batches]).numpy()


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("training images", title="test on other microscopes", title_justify="left")
    for heading in ("weights", "seed", "QWK", "95 % interval", "top-1", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["qwk_interval"]
        table.add_row(
            str(row["images"]), row["weights"], str(row["seed"]), f"{row['qwk']:.3f}",
            f"{low:.3f} to {high:.3f}", f"{row['top1']:.3f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
