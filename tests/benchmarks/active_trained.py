"""`active-trained`: what answers to the least certain images buy a trained network, compared to random.

Each round a reader answers some images of a pool, and the network of the round before is trained further with
all answers so far, as `scalp improve` does when each version is promoted. Each training is kept in the output
folder, so that a stopped command resumes.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jobs.bench.measure import marker, write_result
from jobs.common.console import console, progress_bar
from jobs.train.driver import RECIPES
from scalp_core import storage
from scalp_core.bundles.bundle import serialize_weights
from scalp_core.errors import UserError
from scalp_core.evaluation import metrics, paired
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.architecture import normalize, preprocess_for
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.recipe import Recipe, load_recipe
from scalp_core.models.sampler import images_per_epoch
from scalp_core.models.training_step import TrainingStep
from scalp_core.review.order import order_by_gain
from scalp_core.storage import outputs
from tests.benchmarks.active import Choose, choose_informative, choose_randomly, gains, show_gains
from tests.benchmarks.transfer import Images, make_splits, train_alone

KIND = "active-trained"
_RECIPE = "cpu"
_START = "start"
_BATCH = 64  # of the forward passes after a training


def choose_diverse(
    probabilities: np.ndarray, features: np.ndarray, count: int, draw: np.random.Generator
) -> np.ndarray:
    """Choose uncertain images that look different, as `scalp review --order diverse` does."""
    return order_by_gain(features, probabilities)[:count]


STRATEGIES: dict[str, Choose] = {
    "random": choose_randomly,
    "informative": choose_informative,
    "diverse": choose_diverse,
}


@dataclass(frozen=True)
class ActiveTrainedOptions:
    """Options of `active-trained`.

    Args:
        photographs: Number of synthetic images, of which 70 % are the pool and 30 % the test.
        first: Images with labels before the first round, chosen at random.
        first_epochs: Epochs of the training with them, from ImageNet weights.
        answers: Answers per round.
        rounds: Number of rounds.
        seeds: Number of repetitions, with other first images.
        settings: Changes of the recipe `cpu`, as `key=value`.
        strategies: Strategies to compare, of `STRATEGIES`; the first is `random`.
    """

    photographs: int = 2000
    first: int = 100
    first_epochs: int = 15
    answers: int = 100
    rounds: int = 3
    seeds: int = 5
    settings: tuple[str, ...] = ("size=112", "epochs=5")
    strategies: tuple[str, ...] = tuple(STRATEGIES)


class Training(NamedTuple):
    """One training: its strategy is `start` in round 0, which all strategies share."""

    seed: int
    strategy: str
    number: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.seed}-{self.strategy}-{self.number}"

    @property
    def before(self) -> Training:
        """The training that it continues."""
        return Training(self.seed, self.strategy if self.number > 1 else _START, self.number - 1)


class Outcome(NamedTuple):
    """What is kept of a training.

    Args:
        known: int (K,), numbers of the labeled images of the pool.
        probabilities: float32 (N, 4), of the pool, not calibrated.
        features: float16 (N, D), of the pool: the input of the last layer.
        grades: int (T,), of the test.
    """

    known: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray
    grades: np.ndarray


def bench_active_trained(
    out: str, options: ActiveTrainedOptions, most: int | None = None
) -> dict[str, Any] | None:
    """Train a network after each round of answers, and test it on microscopes that are not in the pool.

    Args:
        out: Output directory, for `summary.json` and the trainings.
        options: Options of the benchmark.
        most: Largest number of trainings of this call; None: all.

    Returns:
        The summary; None if trainings are left.

    Raises:
        UserError: The pool has too few images, or `out` has trainings with other options.
    """
    recipe = load_recipe(_RECIPE, RECIPES, list(options.settings))
    outputs.claim_output(out, marker(KIND))
    folder = _Folder(Path(storage.absolute(out)), options, recipe)
    pool, test = folder.images()
    needed = options.first + options.rounds * options.answers
    if len(pool) < needed:
        raise UserError(f"the pool has {len(pool)} images, fewer than {needed}; use more --photographs")
    trainings = plan_trainings(options)
    missing = [training for training in trainings if not folder.has(training)]
    with progress_bar("training", len(missing[:most])) as (progress, task):
        for training in missing[:most]:
            progress.update(task, note=training.name)
            _train(training, options, recipe, folder, pool, test)
            progress.update(task, advance=1)
    if len(missing) > len(missing[:most]):
        left = len(missing) - len(missing[:most])
        console.print(f"{left} of {len(trainings)} trainings are left; the same command resumes")
        return None
    rows, gained = _measure(trainings, options, folder, test)
    settings = vars(options) | {
        "recipe": recipe.model_dump(),
        "pool_images": len(pool),
        "test_images": len(test),
        "test_groups": len(set(test.groups)),
        "gain_vs_random": gained,
    }
    result = write_result(out, KIND, settings, rows, ratios(gained))
    show_gains(rows, gained)
    return result


def plan_trainings(options: ActiveTrainedOptions) -> list[Training]:
    """All trainings in their order, each after the one that it continues."""
    seeds, numbers = range(options.seeds), range(1, options.rounds + 1)
    return [
        *(Training(seed, _START, 0) for seed in seeds),
        *(
            Training(seed, strategy, number)
            for strategy in options.strategies
            for seed in seeds
            for number in numbers
        ),
    ]


class _Folder:
    """Files of a benchmark: images, and what is kept of each training.

    Raises:
        UserError: The folder has trainings with other options.
    """

    def __init__(self, folder: Path, options: ActiveTrainedOptions, recipe: Recipe) -> None:
        self._folder = folder / "trainings"
        self._options, self._recipe = options, recipe
        # Seeds and strategies may be added.
        others = ("seeds", "settings", "strategies")
        kept = {name: value for name, value in vars(options).items() if name not in others}
        text = json.dumps(kept | {"recipe": recipe.model_dump()}, sort_keys=True)
        file = self._folder / "options.json"
        if file.exists() and file.read_text() != text:
            raise UserError(f"{folder} has trainings with other options; use another --out")
        self._write(file, text.encode())

    def images(self) -> tuple[Images, Images]:
        """The pool, and the images of all other microscopes; drawn when they are first needed."""
        file = self._folder / "images.npz"
        if not file.exists():
            model, _ = initial_model(
                self._recipe.architecture, self._recipe.weights, 0, size=self._recipe.size
            )
            spec = preprocess_for(model, self._recipe.size, self._recipe.resize)
            splits = make_splits(self._options.photographs, spec)
            arrays = {
                f"{name}_{field}": np.array(value)
                for name, images in splits.items()
                for field, value in vars(images).items()
            }
            self._write_arrays(file, arrays)
        with np.load(file) as arrays:
            splits = {
                name: Images(
                    arrays[f"{name}_pixels"], arrays[f"{name}_labels"], arrays[f"{name}_groups"].tolist()
                )
                for name in ("train", "val", "test")
            }
        val, test = splits["val"], splits["test"]
        others = Images(
            np.concatenate([val.pixels, test.pixels]),
            np.concatenate([val.labels, test.labels]),
            val.groups + test.groups,
        )
        return splits["train"], others

    def weights(self, training: Training) -> Path:
        """Path of the weights of a training."""
        return self._folder / f"{training.name}.safetensors"

    def has(self, training: Training) -> bool:
        """Whether a training has ended."""
        return self._outcome(training).exists()

    def save(self, training: Training, weights: bytes, outcome: Outcome) -> None:
        """Keep a training, its outcome last."""
        self._write(self.weights(training), weights)
        self._write_arrays(self._outcome(training), outcome._asdict())

    def load(self, training: Training) -> Outcome:
        """Read what was kept."""
        with np.load(self._outcome(training)) as arrays:
            return Outcome(*(arrays[name] for name in Outcome._fields))

    def _outcome(self, training: Training) -> Path:
        return self._folder / f"{training.name}.npz"

    def _write_arrays(self, file: Path, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        self._write(file, buffer.getvalue())

    def _write(self, file: Path, data: bytes) -> None:
        storage.write(str(file), data)


def _train(
    training: Training,
    options: ActiveTrainedOptions,
    recipe: Recipe,
    folder: _Folder,
    pool: Images,
    test: Images,
) -> None:
    """Choose the images of a round, train with all labels so far, and keep the outcome."""
    draw = np.random.default_rng([training.seed, training.number])
    changes: dict[str, Any] = {"seed": training.seed}
    if training.number == 0:
        known = draw.permutation(len(pool))[: options.first]
        changes["epochs"] = options.first_epochs
    else:
        before = folder.load(training.before)
        others = np.setdiff1d(np.arange(len(pool)), before.known)
        choose = STRATEGIES[training.strategy]
        features = before.features[others].astype(np.float32)
        chosen = choose(before.probabilities[others], features, options.answers, draw)
        known = np.concatenate([before.known, others[chosen]])
        # As `--init`: the head is trained, so no epoch is of the head alone.
        changes |= {"weights": str(folder.weights(training.before)), "frozen_epochs": 0}
    recipe = recipe.model_copy(update=changes)
    steps = recipe.epochs * (images_per_epoch(len(known), recipe.epoch_settings.augment) // recipe.batch_size)
    step, spec, _ = train_alone(recipe, pool.take(known), steps)
    probabilities, features = _forward(step, pool.pixels, spec)
    grades = _forward(step, test.pixels, spec)[0].argmax(1)
    weights = serialize_weights(step.evaluated_model.state_dict())
    folder.save(training, weights, Outcome(known, probabilities, features.astype(np.float16), grades))


def _forward(step: TrainingStep, pixels: np.ndarray, spec: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 (N, 4), and features before the last layer float32 (N, D)."""
    model: Any = step.evaluated_model.eval()
    probabilities, features = [], []
    with torch.inference_mode(), step.autocast():
        for batch in torch.from_numpy(pixels).split(_BATCH):
            inner = model.forward_head(model.forward_features(normalize(batch, spec)), pre_logits=True)
            probabilities.append(model.get_classifier()(inner).float().softmax(1))
            features.append(inner.float())
    return torch.cat(probabilities).numpy(), torch.cat(features).numpy()


def _measure(
    trainings: list[Training], options: ActiveTrainedOptions, folder: _Folder, test: Images
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, float]]]]:
    """Rows of all trainings, and the gains of each strategy over the random choice per round."""
    outcomes = {training: folder.load(training) for training in trainings}
    labels = test.labels.astype(int)
    rows = []
    for training, outcome in outcomes.items():
        scored = metrics.score(labels, outcome.grades)
        values = {key: round(scored[key], 4) for key in ("qwk", "top1")}
        # All strategies share the start.
        for strategy in options.strategies if training.strategy == _START else (training.strategy,):
            rows.append(
                {"strategy": strategy, "seed": training.seed, "round": training.number}
                | {"labels": len(outcome.known)}
                | values
            )
    gained = gains(rows, options.rounds)
    for strategy, by_round in gained.items():
        for number, gain in enumerate(by_round, 1):
            of_strategy, of_random = (
                [outcomes[Training(seed, name, number)].grades for seed in range(options.seeds)]
                for name in (strategy, "random")
            )
            gain |= gain_over_groups(labels, of_strategy, of_random, test.groups)
    return rows, gained


def gain_over_groups(
    labels: np.ndarray, grades: list[np.ndarray], random: list[np.ndarray], groups: list[str]
) -> dict[str, float]:
    """Interval of the mean difference of kappa over resamples of the microscopes; the seeds stay.

    Args:
        labels: int (T,), 0..3.
        grades: Per seed, the grades of a strategy, int (T,).
        random: Per seed, those of the random choice.
        groups: (T,), the microscope of each image.

    Returns:
        `groups_low, groups_high`: the 95 % interval.
    """
    yes, no = np.ones(len(labels), bool), np.zeros(len(labels), bool)
    answers = [paired.Answers(of_seed, yes, no) for of_seed in (*random, *grades)]
    values, count = paired.resample_answers(labels, answers, groups)
    first, second = (
        {name: np.mean([value[name] for value in half], axis=0) for name in paired.METRICS}
        for half in (values[: len(random)], values[len(random) :])
    )
    compared = paired.compare_values(first, second, count)["qwk"]
    return {f"groups_{end}": round(compared[end], 4) for end in ("low", "high")}


def ratios(gained: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Gains of the last round, with the ends of both intervals."""
    return {
        f"{strategy}_qwk_{key}": value
        for strategy, by_round in gained.items()
        for key, value in by_round[-1].items()
    }
