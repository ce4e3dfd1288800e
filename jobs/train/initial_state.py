"""The initial state of a run: initial weights, and a check that they can become a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.common import provenance
from jobs.common.console import read_json, write_json
from jobs.common.graphs import with_float_graph
from scalp_core import storage
from scalp_core.bundles.bundle import INITIAL_FILE, Bundle, serialize_weights, sha256
from scalp_core.bundles.contract import (
    WEIGHTS_FILE,
    BundleSpec,
    Conformal,
    InitialWeights,
    OtherSymptom,
    Training,
)
from scalp_core.datasets.other_symptoms import other_symptoms, symptom_id
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE, Recipe

if TYPE_CHECKING:
    import torch  # takes seconds to import: mistakes that do not need it are reported before

_RECORD_FILE = "initial.json"
_IMAGES = 2  # minimum of batch normalization in training


class InitialState(NamedTuple):
    """Initial weights of a training, with their preprocessing.

    Args:
        weights: Weights, serialized as safetensors.
        record: Origin of the weights.
        spec: Preprocessing of the weights.
        batch_norm: Whether the architecture has batch normalization.
        notes: Messages about limits of the architecture, printed at the start.
    """

    weights: bytes
    record: InitialWeights
    spec: Preprocess
    batch_norm: bool
    notes: list[str]


def make_initial_state(recipe: Recipe) -> InitialState:
    """Load the initial weights of a recipe, and check that they can become a bundle.

    Raises:
        UserError: The weights are unavailable or do not fit, or the architecture cannot be served.
    """
    from scalp_core.models.architecture import preprocess_for
    from scalp_core.models.batch_norm import has_batch_norm
    from scalp_core.models.initial_weights import initial_model

    model, record = initial_model(
        recipe.architecture,
        recipe.weights,
        recipe.seed,
        recipe.head,
        recipe.size,
        recipe.model,
        recipe.heads,
    )
    spec = preprocess_for(model, recipe.size, recipe.resize)
    weights = serialize_weights(model.state_dict())
    notes = check_servable(recipe, spec, model, weights)
    return InitialState(weights, record, spec, has_batch_norm(model), notes)


def load_initial_state(run: str) -> InitialState | None:
    """Load the initial state that an earlier attempt saved, or None; a resumed run downloads nothing."""
    record = read_json(storage.join(run, _RECORD_FILE))
    if not record:
        return None
    weights = storage.read(initial_uri(run))
    if sha256(weights) != record["weights_sha256"]:
        return None
    return InitialState(
        weights,
        InitialWeights(**record["initial_weights"]),
        Preprocess(**record["preprocess"]),
        record["batch_norm"],
        record["notes"],
    )


def save_initial_state(run: str, start: InitialState) -> None:
    """Save the initial state in the run directory, the record last."""
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
    """Return the URI of a run's initial weights, which its workers read."""
    return storage.join(run, INITIAL_FILE)


def check_servable(recipe: Recipe, spec: Preprocess, model: torch.nn.Module, weights: bytes) -> list[str]:
    """Check that initial weights can become a bundle, by running the steps after training on them.

    This takes seconds; without it, a run would fail at its end.

    Args:
        recipe: Recipe with architecture, head and loss.
        spec: Preprocessing.
        model: Model with the initial weights; its running statistics change.
        weights: Weights of `model`, serialized.

    Returns:
        Messages about optional functions that the architecture does not support.

    Raises:
        UserError: A step fails; the message has the reason.
    """
    import torch

    from scalp_core.inference.gradcam import TorchExplainer
    from scalp_core.inference.torch_runtime import TorchRuntime
    from scalp_core.models.architecture import normalize, to_channels_last

    shape = (_IMAGES, spec.size, spec.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    training = Training(
        recipe={},
        initial_weights=InitialWeights(source=recipe.weights),
        workers=1,
        best_epoch=1,
        data_sha256="",
        grade_counts=[0] * NUM_GRADES,
    )
    bundle = Bundle(draft_spec(recipe, spec, weights, training), files={WEIGHTS_FILE: weights})
    with _step(recipe, "a step of training"):
        logits = to_channels_last(model.train())(normalize(torch.from_numpy(images), spec))
        expected = (_IMAGES, NUM_GRADES * recipe.heads)
        if logits.shape != expected:
            raise ValueError(f"logits of shape {tuple(logits.shape)}, not {expected}")
        logits.square().sum().backward()
        # Data-parallel workers would wait forever for gradients of unused parameters.
        if idle := [name for name, weight in model.named_parameters() if weight.grad is None]:
            raise ValueError(f"{', '.join(idle[:3])} have no gradient")
    with _step(recipe, "the conversion to a graph for CPUs"):
        with_float_graph(bundle, iter([(images, np.arange(_IMAGES))]))
    with _step(recipe, "the forward pass in bf16"):
        TorchRuntime(bundle, "cpu", "bf16", folded=False).logits(images)
    try:
        with _step(recipe, "a heatmap"):
            TorchExplainer(bundle, "cpu").heatmap(images[0])
    except UserError as error:
        return [f"scalp explain has no heatmaps for this model: {error}"]
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
            f"{type(error).__name__}: {first_line(error)}; choose an architecture listed in "
            f"docs/training.md, such as --set architecture={DEFAULT_ARCHITECTURE}, or another --set size"
        ) from error


def draft_spec(
    recipe: Recipe,
    spec: Preprocess,
    weights: bytes,
    training: Training,
    name: str = "first-weights",
    symptom: str | None = None,
) -> BundleSpec:
    """Make the contract of a bundle before its calibration.

    Args:
        recipe: Recipe of the training.
        spec: Preprocessing.
        weights: Weights of the model, serialized.
        training: Provenance of the weights.
        name: Name of the run.
        symptom: `DataSpec.symptom` of the labels.
    """
    others = other_symptoms(symptom) if recipe.symptoms == "all" else ()
    return BundleSpec(
        name=name,
        created_at=datetime.now(UTC),
        architecture=recipe.architecture,
        head=recipe.head,
        model=recipe.model,
        symptom=symptom_id(symptom),
        other_symptoms=tuple(OtherSymptom(name=other, images=0) for other in others),
        preprocess=spec,
        temperature=1.0,
        conformal=Conformal(coverage=recipe.coverage),
        training=training,
        metrics={},
        versions=provenance.versions(),
        git_revision=provenance.git_revision(),
        weights_sha256=sha256(weights),
    )
