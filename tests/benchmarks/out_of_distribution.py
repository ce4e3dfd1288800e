"""`out-of-distribution`: what the gates detect, compared with scores of the network."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from rich.table import Table
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from jobs.bench.measure import marker, write_result
from jobs.common.console import console, progress_bar
from jobs.common.images import LoadImages, fetch
from jobs.common.inference import Computation
from jobs.evaluate.features import AddFeatures
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.locations import location_of
from scalp_core.errors import UserError
from scalp_core.images import gates
from scalp_core.inference.predictor import Predictor
from scalp_core.storage import outputs
from scalp_core.synthetic.dataset import render_jpeg
from scalp_core.synthetic.plan import SynthOptions, plan_dataset
from tests.support import negatives

_GATES = "gates"
_NEIGHBOR = 10
_BATCH = 64

Array = np.ndarray


def _blur(radius: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(radius))


def _darken(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: ImageEnhance.Brightness(picture).enhance(factor)


def _zoom(factor: int) -> Callable[[Image.Image], Image.Image]:
    def crop(picture: Image.Image) -> Image.Image:
        width, height = (side // factor for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height)).resize(picture.size)

    return crop


def _shuffle(picture: Image.Image) -> Image.Image:
    """Move the 16 tiles of a 4 by 4 grid: a scalp in detail, but not as a whole."""
    pixels = np.asarray(picture)
    rows = np.array_split(pixels, 4)
    tiles = [tile for row in rows for tile in np.array_split(row, 4, axis=1)]
    order = np.random.default_rng(0).permutation(len(tiles))
    moved = [
        np.concatenate([tiles[place] for place in order[start : start + 4]], 1) for start in (0, 4, 8, 12)
    ]
    return Image.fromarray(np.concatenate(moved))


_CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{f"blurred by {radius} pixels of 640": _blur(radius) for radius in (2, 3, 4, 6)},
    **{f"darkened to {factor}": _darken(factor) for factor in (0.7, 0.5, 0.3)},
    **{f"magnified {factor} times": _zoom(factor) for factor in (2, 4)},
    "gray": lambda picture: picture.convert("L").convert("RGB"),
    "16 tiles in another order": _shuffle,
}

# Scalps of other people and microscopes. Of these, the gates should flag few.
_SCALPS = {
    "other scalps": SynthOptions(devices=15, seed=77),
    "colors three times as varied": SynthOptions(devices=15, seed=78, color_cast=3.0),
    "all six symptoms": SynthOptions(devices=15, seed=79, symptoms="all"),
}


def bench_out_of_distribution(out: str, bundle: str, data: str, count: int = 150) -> dict[str, Any]:
    """Score images of other kinds, and scalps of unseen microscopes, by each method.

    Methods on the features (the input of the classifier) and the logits: Mahalanobis distance to the nearest
    grade with a shared covariance (Lee 2018), angle to the tenth nearest training image (Sun 2022), energy
    (Liu 2020) and the top probability (Hendrycks and Gimpel 2017).

    Args:
        out: Output folder, for `summary.json`.
        bundle: Trained bundle with gates.
        data: Prepared data that it was trained on; its test split has microscopes of its own.
        count: Largest number of images of each kind.

    Returns:
        The summary. Its rows have, per kind and method, the AUROC against the test split, and the share
        above a limit: 1 for the gates, for the others the value that 99 % of the val split keep.

    Raises:
        UserError: The bundle has no gates, or an image cannot be read.
    """
    outputs.claim_output(out, marker("out-of-distribution"))
    measure = _Measure(load_bundle(bundle))
    table = manifest.read_manifest(data)
    splits = {name: manifest.select_split(table, name) for name in ("train", "val", "test")}
    files = {name: _read(rows.to_pylist()) for name, rows in splits.items()}
    kinds = _kinds(files["test"][:count], count)
    scored: dict[str, dict[str, Array]] = {}
    with progress_bar("scoring", len(kinds) + 3) as (progress, task):

        def advance() -> None:
            progress.advance(task)

        measure.fit(files["train"], np.array(splits["train"]["label"].to_pylist()))
        advance()
        reference = {}
        for name in ("val", "test"):
            reference[name] = measure.scores(files[name])
            advance()
        for kind, images in kinds.items():
            scored[kind] = measure.scores(images)
            advance()
    limits = {name: float(np.quantile(values, 0.99)) for name, values in reference["val"].items()} | {
        _GATES: 1.0
    }
    aurocs = {
        kind: {name: _auroc(reference["test"][name], values) for name, values in scores.items()}
        for kind, scores in scored.items()
    }
    rows = [
        {
            "kind": kind,
            "images": len(scores[_GATES]),
            "auroc": aurocs[kind],
            "flagged": {name: float((values > limits[name]).mean()) for name, values in scores.items()},
        }
        for kind, scores in scored.items()
    ]
    settings = {
        "count": count,
        "images": {name: len(values) for name, values in files.items()},
        "false_flags": {
            name: float((values > limits[name]).mean()) for name, values in reference["test"].items()
        },
        "model_version": measure.bundle.spec.model_version,
        "architecture": measure.bundle.spec.architecture,
        "size": measure.bundle.spec.preprocess.size,
    }
    unlike = [auroc for kind, auroc in aurocs.items() if kind not in _SCALPS]
    means = {f"mean_auroc_{name}": float(np.mean([auroc[name] for auroc in unlike])) for name in limits}
    result = write_result(out, "out-of-distribution", settings, rows, means)
    _show(rows, list(limits))
    return result


class _Measure:
    """Scores of images, higher for those that look less like the training images."""

    def __init__(self, bundle: Bundle) -> None:
        if bundle.spec.gates is None:
            raise UserError(f"{bundle.uri} has no gates; train it again")
        self.bundle, self._gates = bundle, bundle.spec.gates
        self._predictor = Predictor(bundle, "cpu")
        computation = Computation("cpu", self._predictor.precision, "torch", {})
        self._add_features = AddFeatures(lambda: bundle, computation, 1)
        self._load = LoadImages(bundle.spec.preprocess)

    def fit(self, files: list[bytes], labels: Array) -> None:
        """Fit the distances between features to the training images and their grades."""
        _, features, _ = self._compute(files)
        self._centers = np.stack([features[labels == grade].mean(0) for grade in np.unique(labels)])
        places = np.searchsorted(np.unique(labels), labels)
        covariance = LedoitWolf(assume_centered=True).fit(features - self._centers[places]).covariance_
        self._precision = np.linalg.inv(covariance)
        self._neighbors = NearestNeighbors(n_neighbors=_NEIGHBOR, metric="cosine").fit(features)

    def scores(self, files: list[bytes]) -> dict[str, Array]:
        """Score images by each method, float64 (N,) each."""
        statistics, features, logits = self._compute(files)
        apart = features[:, None] - self._centers
        distances = np.einsum("ngd,de,nge->ng", apart, self._precision, apart, optimize=True)
        return {
            _GATES: gates.unlikeness(statistics, self._gates),
            "mahalanobis": np.sqrt(distances.min(1)),
            "neighbor": self._neighbors.kneighbors(features)[0][:, -1],
            "energy": -logsumexp(logits, axis=1),
            "top_probability": -softmax(logits, axis=1).max(1),
        }

    def _compute(self, files: list[bytes]) -> tuple[Array, Array, Array]:
        """Statistics (N, K), features (N, D) and logits (N, 4) of images."""
        parts = []
        for start in range(0, len(files), _BATCH):
            loaded = self._load.decoded({}, list(files[start : start + _BATCH]))
            logits = self._predictor.logits(loaded["image"])
            features = self._add_features({"image": loaded["image"]})["features"]
            parts.append((loaded["statistics"], features, logits))
        statistics, features, logits = map(np.concatenate, zip(*parts, strict=True))
        return statistics, features, logits


def _kinds(scalps: list[bytes], count: int) -> dict[str, list[bytes]]:
    """Images by kind: none of a scalp, changed ones of scalps, and scalps of other people and microscopes."""
    rng = np.random.default_rng(5)
    kinds = {
        kind: [negatives.as_file(draw(rng)) for _ in range(min(60, count))]
        for kind, draw in negatives.KINDS.items()
    }
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in scalps]
    kinds |= {
        kind: [negatives.as_file(change(picture)) for picture in pictures]
        for kind, change in _CHANGES.items()
    }
    for kind, options in _SCALPS.items():
        kinds[kind] = [
            render_jpeg(plan) for plan in plan_dataset(options.model_copy(update={"images": count}))
        ]
    kinds["scalps without a hair"] = [
        render_jpeg(replace(plan, scalp=replace(plan.scalp, hairs=0.0)))
        for plan in plan_dataset(SynthOptions(images=count, devices=15, seed=77))
    ]
    return kinds


def _read(rows: list[dict[str, Any]]) -> list[bytes]:
    files = fetch([location_of(row) for row in rows])
    if errors := [file for file in files if not isinstance(file, bytes)]:
        raise UserError(f"an image of the data cannot be read ({errors[0]}); prepare the data again")
    return [file for file in files if isinstance(file, bytes)]


def _auroc(inside: Array, outside: Array) -> float:
    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return round(float(roc_auc_score(truth, np.concatenate([inside, outside]))), 4)


def _show(rows: list[dict[str, Any]], names: list[str]) -> None:
    table = Table("kind", *names, "flagged by the gates", title="AUROC against scalps of unseen microscopes")
    for row in rows:
        values = (f"{row['auroc'][name]:.3f}" for name in names)
        table.add_row(row["kind"], *values, f"{row['flagged'][_GATES]:.0%}")
    console.print(table)
