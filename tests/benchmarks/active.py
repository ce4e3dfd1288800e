"""`active`: what answers to the least certain images buy, compared with answers to random images.

Each round a reader answers some images of a pool, and a model is fitted to all answers so far. The model is
a linear probe: logistic regression on the features of ImageNet weights. It takes a second to fit, so that a
choice can be repeated for many seeds; it says nothing about fine-tuning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table
from scipy import stats
from sklearn.decomposition import PCA

from jobs.bench.measure import write_result
from jobs.common.console import console, progress_bar
from jobs.train.driver import RECIPES
from scalp_core.errors import UserError
from scalp_core.evaluation import metrics
from scalp_core.evaluation.linear_probe import predict_linear_probe
from scalp_core.images.preprocess import Preprocess
from scalp_core.labels.queue import order_by_margin
from scalp_core.models.architecture import normalize, preprocess_for
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.recipe import load_recipe
from tests.benchmarks.transfer import Images, make_splits

_RECIPE = "cpu"
_BATCH = 64
_COMPONENTS = 128  # principal components of the features, so that a fit takes a second
_CANDIDATES = 4  # of the least certain images, per answer, among which `diverse` chooses

Choose = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class ActiveOptions:
    """Options of `active`.

    Args:
        photographs: Number of synthetic images, of which 70 % are the pool and 10 % the test.
        first: Images with labels before the first round, chosen at random.
        answers: Answers per round.
        rounds: Number of rounds.
        seeds: Number of repetitions, with other first images.
    """

    photographs: int = 3600
    first: int = 200
    answers: int = 100
    rounds: int = 3
    seeds: int = 5


def choose_randomly(
    probabilities: np.ndarray, features: np.ndarray, count: int, draw: np.random.Generator
) -> np.ndarray:
    """Choose images at random: `scalp review --order referred`, for images in no order."""
    return draw.choice(len(features), count, replace=False)


def choose_informative(
    probabilities: np.ndarray, features: np.ndarray, count: int, draw: np.random.Generator
) -> np.ndarray:
    """Choose the images with the smallest margin, as `scalp review --order informative` does."""
    likeliest = probabilities.argmax(1)[:, None].tolist()
    rows = pa.table({"probabilities": probabilities.tolist(), "grade_set": likeliest})
    return order_by_margin(rows)[:count]


def choose_diverse(
    probabilities: np.ndarray, features: np.ndarray, count: int, draw: np.random.Generator
) -> np.ndarray:
    """Choose the least certain image of each cluster of uncertain images, which look different."""
    from sklearn.cluster import KMeans

    uncertain = choose_informative(probabilities, features, count * _CANDIDATES, draw)
    seed = int(draw.integers(2**31))
    clusters = KMeans(min(count, len(uncertain)), random_state=seed).fit_predict(features[uncertain])
    return uncertain[np.unique(clusters, return_index=True)[1]]


STRATEGIES: dict[str, Choose] = {
    "random": choose_randomly,
    "informative": choose_informative,
    "informative, diverse": choose_diverse,
}


def bench_active(out: str, options: ActiveOptions) -> dict[str, Any]:
    """Fit models to the answers of each strategy, and test them on microscopes that are not in the pool.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The pool has too few images.
    """
    recipe = load_recipe(_RECIPE, RECIPES, [])
    model, _ = initial_model(recipe.architecture, recipe.weights, 0, size=recipe.size)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    splits = make_splits(options.photographs, spec)
    pool, test = splits["train"], splits["test"]
    needed = options.first + options.rounds * options.answers
    if len(pool) < needed:
        raise UserError(f"the pool has {len(pool)} images, fewer than {needed}; use more --photographs")
    features = {name: _features(model, images, spec) for name, images in splits.items()}
    reduced = PCA(min(_COMPONENTS, len(pool) - 1), whiten=True, random_state=0).fit(features["train"])
    features = {name: reduced.transform(of_split) for name, of_split in features.items()}
    rows = []
    turns = list(itertools.product(range(options.seeds), STRATEGIES))
    with progress_bar("choosing and fitting", len(turns)) as (progress, task):
        for seed, name in turns:
            rows += _run(name, seed, options, pool, features["train"], test, features["test"])
            progress.update(task, advance=1)
    gained = gains(rows, options.rounds)
    settings = vars(options) | {
        "features": f"{_COMPONENTS} components of {recipe.architecture}, {recipe.size} px, ImageNet weights",
        "pool_images": len(pool),
        "test_images": len(test),
        "test_groups": len(set(test.groups)),
        "gain_vs_random": gained,
    }
    result = write_result(out, "active", settings, rows, ratios(gained))
    show_gains(rows, gained)
    return result


def _run(
    name: str,
    seed: int,
    options: ActiveOptions,
    pool: Images,
    features: np.ndarray,
    test: Images,
    test_features: np.ndarray,
) -> list[dict[str, Any]]:
    """Answer the images that a strategy chooses, and score the model of each round; round 0 is the start."""
    draw = np.random.default_rng(seed)
    known = draw.permutation(len(pool))[: options.first]  # the same for each strategy
    rows = []
    for number in range(options.rounds + 1):
        others = np.setdiff1d(np.arange(len(pool)), known)
        groups = [pool.groups[row] for row in known]
        asked = np.concatenate([test_features, features[others]])
        probabilities, _ = predict_linear_probe(features[known], pool.labels[known], groups, asked, seed)
        grades = probabilities[: len(test)].argmax(1)
        scored = metrics.score(test.labels, grades)
        rows.append(
            {"strategy": name, "seed": seed, "round": number, "labels": len(known)}
            | {key: round(scored[key], 4) for key in ("qwk", "top1")}
        )
        if number < options.rounds:
            chosen = STRATEGIES[name](probabilities[len(test) :], features[others], options.answers, draw)
            known = np.concatenate([known, others[chosen]])
    return rows


def _features(model: Any, images: Images, spec: Preprocess) -> np.ndarray:
    """Features before the last layer, float32 (N, D)."""
    model.eval()
    with torch.inference_mode():
        batches = torch.from_numpy(images.pixels).split(_BATCH)
        return torch.cat(
            [
                model.forward_head(model.forward_features(normalize(batch, spec)), pre_logits=True)
                for batch in batches
            ]
        ).numpy()


def gains(rows: list[dict[str, Any]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Difference of kappa to the random choice after each round: mean over seeds, and its 95 % t interval."""
    kappa = {(row["strategy"], row["round"], row["seed"]): row["qwk"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    found: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(row["strategy"] for row in rows if row["strategy"] != "random"):
        found[name] = []
        for number in range(1, rounds + 1):
            differences = [kappa[name, number, seed] - kappa["random", number, seed] for seed in seeds]
            mean, error = np.mean(differences), stats.sem(differences)
            half = error * stats.t.ppf(0.975, len(seeds) - 1)
            values = {"gain": mean, "low": mean - half, "high": mean + half}
            found[name].append({key: round(float(value), 4) for key, value in values.items()})
    return found


def ratios(gained: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Gains of the last round, with the ends of their intervals."""
    names = {"informative": "informative", "informative, diverse": "diverse"}
    return {
        f"{short}_qwk_{key}": gained[name][-1][key]
        for name, short in names.items()
        for key in ("gain", "low", "high")
    }


def show_gains(rows: list[dict[str, Any]], gained: dict[str, list[dict[str, float]]]) -> None:
    """Print kappa and gain per strategy and round."""
    table = Table("strategy", title="test on other microscopes, means over seeds", title_justify="left")
    for heading in ("round", "labels", "QWK", "more than random", "95 % interval"):
        table.add_column(heading, justify="right")
    strategies, rounds = dict.fromkeys(row["strategy"] for row in rows), {row["round"] for row in rows}
    for name, number in itertools.product(strategies, sorted(rounds)):
        found = [row for row in rows if (row["strategy"], row["round"]) == (name, number)]
        gain = gained[name][number - 1] if number and name in gained else None
        table.add_row(
            name, str(number), str(found[0]["labels"]), f"{np.mean([row['qwk'] for row in found]):.3f}",
            f"{gain['gain']:+.3f}" if gain else "",
            f"{gain['low']:+.3f} to {gain['high']:+.3f}" if gain else "",
        )  # fmt: skip
    console.print(table)
