"""First weights of a run, and the check before its first epoch that they can become a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.common.console import read_json, write_json
from jobs.common.graphs import with_float_graph
from scalp_core import storage
from scalp_core.bundles.bundle import (
    WEIGHTS_FILE,
    Bundle,
    BundleSpec,
    Conformal,
    InitialWeights,
    Training,
    load_weights,
    serialize_weights,
    sha256,
)  # fmt: skip
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE, Recipe

if TYPE_CHECKING:
    import torch  # takes seconds: mistakes that need none are reported before

_WEIGHTS_FILE, _RECORD_FILE = "initial.safetensors", "initial.json"
_IMAGES = 2  # the fewest that batch normalization takes in training


class Start(NamedTuple):
    """First weights of a training.

    Args:
        weights: serialized as safetensors.
        record: their origin.
        spec: preprocessing that belongs to them.
        batch_norm: whether the architecture has batch normalization.
        notes: lines about the architecture's limits, for the opening.
    """

    weights: bytes
    record: InitialWeights
    spec: Preprocess
    batch_norm: bool
    notes: list[str]


def first_start(recipe: Recipe) -> Start:
    """Load the first weights of a recipe, and check that they can become a bundle.

    Raises:
        UserError: the weights are unavailable or do not fit, or the architecture cannot be served.
    """
    from scalp_core.models.architecture import preprocess_for
    from scalp_core.models.batch_norm import has_batch_norm
    from scalp_core.models.initial_weights import initial_model

    model, record = initial_model(recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    weights = serialize_weights(model.state_dict())
    notes = check_servable(recipe, spec, model, weights)
    return Start(weights, record, spec, has_batch_norm(model), notes)


def saved_start(run: str) -> Start | None:
    """The first weights that an earlier attempt at this run kept, or None: a resumed run fetches nothing."""
    kept = read_json(storage.join(run, _RECORD_FILE))
    if not kept:
        return None
    weights = storage.read(initial_uri(run))
    if sha256(weights) != kept["weights_sha256"]:
        return None
    return Start(
        weights,
        InitialWeights(**kept["initial_weights"]),
        Preprocess(**kept["preprocess"]),
        kept["batch_norm"],
        kept["notes"],
    )


def save_start(run: str, start: Start) -> None:
    """Keep the first weights in the run directory, the record last."""
    storage.write(initial_uri(run), start.weights)
    record = {
        "initial_weights": start.record.model_dump(),
        "preprocess": start.spec.model_dump(mode="json"),
        "batch_norm": start.batch_norm,
        "notes": start.notes,
        "weights_sha256": sha256(start.weights),
    }
    write_json(storage.join(run, _RECORD_FILE), record)


def initial_uri(run: str) -> str:
    """Where a run keeps its first weights, for its workers."""
    return storage.join(run, _WEIGHTS_FILE)


def check_servable(recipe: Recipe, spec: Preprocess, model: torch.nn.Module, weights: bytes) -> list[str]:
    """Take first weights through all that the end of training does: seconds now instead of a lost run.

    Args:
        recipe: its architecture, head and loss.
        spec: preprocessing.
        model: with the first weights; its running statistics change.
        weights: those of `model`, serialized.

    Returns:
        lines about optional functions that the architecture lacks.

    Raises:
        UserError: a step fails, with its reason.
    """
    import torch

    from scalp_core.inference.gradcam import Explainer
    from scalp_core.inference.torch_runtime import TorchRuntime
    from scalp_core.models.architecture import normalize, to_channels_last

    shape = (_IMAGES, spec.size, spec.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    bundle = Bundle(_draft(recipe, spec, weights), files={WEIGHTS_FILE: weights})
    with _step(recipe, "a step of training"):
        logits = to_channels_last(model.train())(normalize(torch.from_numpy(images), spec))
        if logits.shape != (_IMAGES, NUM_GRADES):
            raise ValueError(f"logits of shape {tuple(logits.shape)}, not {(_IMAGES, NUM_GRADES)}")
        logits.square().sum().backward()
        # Data-parallel workers would wait for the gradients of these for ever.
        if idle := [name for name, weight in model.named_parameters() if weight.grad is None]:
            raise ValueError(f"{', '.join(idle[:3])} do not take part in it")
    with _step(recipe, "the conversion to a graph for CPUs"):
        with_float_graph(bundle, iter([(images, np.arange(_IMAGES))]))
    with _step(recipe, "the forward pass in bf16"):
        TorchRuntime(
            recipe.architecture, load_weights(weights), spec, "cpu", "bf16", head=recipe.head
        ).logits(images)
    try:
        with _step(recipe, "a heat map"):
            Explainer(bundle, "cpu").heatmap(images[0])
    except UserError as error:
        return [f"no heat maps by scalp explain: {error}"]
    return []


@contextmanager
def _step(recipe: Recipe, name: str) -> Iterator[None]:
    from scalp_core.models.architecture import first_line

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{recipe.architecture} at {recipe.size} px cannot become a bundle: {name} fails with "
            f"{type(error).__name__}: {first_line(error)}; choose an architecture of the list in "
            f"docs/training.md, such as --set architecture={DEFAULT_ARCHITECTURE}, or another --set size"
        ) from error


def _draft(recipe: Recipe, spec: Preprocess, weights: bytes) -> BundleSpec:
    """The contract of a bundle that is never saved."""
    return BundleSpec(
        name="first-weights",
        created_at=datetime.now(UTC),
        architecture=recipe.architecture,
        head=recipe.head,
        preprocess=spec,
        temperature=1.0,
        conformal=Conformal(coverage=recipe.coverage, quantile=1.0),
        training=Training(
            recipe={},
            initial_weights=InitialWeights(source=recipe.weights),
            workers=1,
            best_epoch=1,
            data_sha256="",
            grade_counts=[0] * NUM_GRADES,
        ),
        metrics={},
        versions={},
        git_revision=None,
        weights_sha256=sha256(weights),
    )
