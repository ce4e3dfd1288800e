"""The training recipe: typed settings, read from YAML with overrides from the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scalp_core import storage
from scalp_core.bundles.contract import Head, ModelKeywords
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import SCHEME, pin_version
from scalp_core.evaluation.targets import parse_targets
from scalp_core.grades import SYMPTOMS
from scalp_core.images.preprocess import Resize
from scalp_core.models.sampler import Augment, EpochSettings, Sampling, resolve_augment
from scalp_core.settings import load_yaml, parse_settings, rename_old_keys

BatchNorm = Literal["worker", "sync", "frozen"]
LossName = Literal["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"]

DEFAULT_ARCHITECTURE = "legacy_xception"
FEW_IMAGES = 16
"""Images per worker and step below which `batch_norm: auto` takes the statistics over all workers. Below it
batch normalization gets worse (Wu and He 2018)."""

_TRAPEZOID_DECAY_SHARE = 0.3  # fraction of the steps after the warm-up


class Condition(NamedTuple):
    """A setting that has an effect only for some values of another setting.

    Args:
        setting: Key of the setting.
        other: Key of the other setting, declared before it.
        values: Values of the other setting for which `setting` has an effect.
        neutral: Value of `setting` when it has no effect.
    """

    setting: str
    other: str
    values: tuple[str, ...]
    neutral: float

    def is_met(self, values: Mapping[str, Any]) -> bool:
        """Whether the setting has an effect in a recipe with these values."""
        return values.get(self.other) in self.values


CONDITIONS = (
    Condition("label_smoothing", "loss", ("cross_entropy", "weighted_cross_entropy"), neutral=0.0),
    Condition("softness", "loss", ("soft_ordinal",), neutral=1.0),
)


def without_effect(values: Mapping[str, Any]) -> dict[str, float]:
    """Find the settings without an effect in a recipe with these values, with their neutral values."""
    return {condition.setting: condition.neutral for condition in CONDITIONS if not condition.is_met(values)}


def _default_smoothing(earlier: Mapping[str, Any]) -> float:
    """Default of `label_smoothing`, from the values of the fields declared before it."""
    return without_effect(earlier).get("label_smoothing", 0.05)


class Recipe(BaseModel):
    """A training recipe. Batch size and learning rate are those of the whole run, however many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _old_keys = model_validator(mode="before")(rename_old_keys)

    architecture: str = Field(DEFAULT_ARCHITECTURE, description="timm name of the classifier")
    weights: str = Field(
        "imagenet",
        description="initial weights: imagenet, offline (of a pip package), none, a .safetensors or .pth "
        "file, or a bundle; local or s3://",
    )
    model: ModelKeywords = Field(
        {},
        description="keywords of timm.create_model, such as {drop_path_rate: 0.1}; also {global_pool: gem}",
    )
    symptoms: Literal["one", "all"] = Field(
        "one",
        description="all: a head for each of the six symptoms of the manifest; one: for the label alone",
    )
    size: int = Field(224, ge=32, le=1024, description="side of the square input, pixels")
    resize: Resize = Field("crop", description="how an image becomes a square: crop, pad or squash")
    epochs: int = Field(12, ge=1, description="passes over the training split")
    frozen_epochs: int = Field(0, ge=0, description="first epochs, in which only the last layer learns")
    batch_size: int = Field(32, ge=2, description="images per step, over all workers")
    accumulate: int = Field(1, ge=1, description="micro-batches per step and worker (gradient accumulation)")
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="adam is the paper's")
    learning_rate: float = Field(
        1e-3, gt=0, description="peak learning rate for this batch_size, for any number of workers"
    )
    schedule: Literal["cosine", "trapezoid", "constant"] = Field(
        "cosine", description="schedule after the warm-up; trapezoid: constant, then linearly to zero"
    )
    warmup_share: float = Field(0.1, ge=0, lt=1, description="fraction of the steps with linear warm-up")
    weight_decay: float = Field(
        0.05, ge=0, description="weight decay of all weights except biases and normalization"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a layer relative to that of the layer above it"
    )
    loss: LossName = Field(
        "cross_entropy", description="cross_entropy, weighted_cross_entropy, corn or soft_ordinal"
    )
    label_smoothing: float = Field(
        default_factory=_default_smoothing,
        ge=0,
        lt=1,
        description="label smoothing of the two cross-entropies; 0.05 unless set",
    )
    softness: float = Field(1.0, gt=0, description="spread of the labels of soft_ordinal over the grades")
    sampling: Sampling = Field(
        "natural", description="balanced: shows each grade equally often, and repeats rare ones"
    )
    augment: Augment = Field(
        "auto",
        description="flips: one of four flips per image and epoch; dihedral: one of eight flips and "
        "rotations; x4: each image in four of them per epoch, like the paper; none; auto: flips if resize is "
        "squash, because rotation changes squashed shapes, else dihedral",
    )
    color_jitter: float = Field(
        0.0, ge=0, le=0.5, description="largest change of brightness, contrast and each color; 0: none"
    )
    min_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="smallest area of a random square crop of a training image, as a fraction; 1: none",
    )
    blur: float = Field(
        0.0, ge=0, le=5, description="largest radius of a random Gaussian blur, pixels; 0: none"
    )
    jpeg_quality: int = Field(
        100, ge=10, le=100, description="lowest quality of a random JPEG compression; 100: none"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights; 0: no average"
    )
    batch_norm: Literal["auto", BatchNorm] = Field(
        "auto",
        description="statistics over each worker's images, over all workers (sync), or those of the initial "
        f"weights (frozen); auto: sync if a worker has fewer than {FEW_IMAGES} per micro-batch, else worker",
    )
    gradient_clip: float = Field(
        1.0, ge=0, description="largest norm of a step's gradient, over all weights; 0: no clipping"
    )
    coverage: float = Field(
        0.9, gt=0, lt=1, description="least coverage that the grade sets promise (conformal)"
    )
    referral: str = Field(
        "wrong<=10%",
        description="target of referral: wrong<=5% (of the answered images), found>=95% (of moderate or "
        "worse), both with a comma, or none (refers each grade set of more than one grade)",
    )
    seed: int = Field(0, ge=0, description="random seed of weights, order and augmentation")

    @field_validator("referral")
    @classmethod
    def _is_target(cls, text: str) -> str:
        parse_targets(text)
        return text

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.frozen_epochs >= self.epochs:
            raise ValueError(
                f"frozen_epochs ({self.frozen_epochs}) must be fewer than epochs ({self.epochs}); set "
                "frozen_epochs=0, or more epochs"
            )
        if self.batch_norm == "frozen" and self.weights == "none":
            raise ValueError(
                "batch_norm: frozen needs pretrained weights, and weights is none; use batch_norm=auto"
            )
        for setting, other, values, neutral in CONDITIONS:
            current, of_other = getattr(self, setting), getattr(self, other)
            if of_other not in values and current != neutral:
                raise ValueError(
                    f"{setting} ({current:g}) has no effect with {other}: {of_other}; use "
                    f"{setting}={neutral:g}, or {' or '.join(f'{other}={value}' for value in values)}"
                )
        return self

    def effective_settings(self, workers: int) -> dict[str, Any]:
        """Settings that determine the training: recipes that are equal here train identically."""
        resolved = {"augment": self.epoch_settings.augment, "batch_norm": self.resolve_batch_norm(workers)}
        return self.model_dump(exclude={"coverage", "referral"}) | resolved

    def resolve_batch_norm(self, workers: int) -> BatchNorm:
        """Resolve `batch_norm` for a number of workers; a single worker never synchronizes."""
        if self.batch_norm == "frozen":
            return "frozen"
        few = self.batch_size // workers // self.accumulate < FEW_IMAGES
        wanted = self.batch_norm == "sync" or (self.batch_norm == "auto" and few)
        return "sync" if workers > 1 and wanted else "worker"

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Compute the factor of `learning_rate` at a step, from 0, of the run's `steps`.

        While only the last layer learns, it is constant after a warm-up. Then all layers warm up again.
        """
        frozen = steps * self.frozen_epochs // self.epochs
        is_frozen = step < frozen
        step, steps = (step, frozen) if is_frozen else (step - frozen, steps - frozen)
        warm = int(steps * self.warmup_share)
        if step < warm:
            return (step + 1) / warm
        left = max(0.0, (steps - step) / max(1, steps - warm))
        match "constant" if is_frozen else self.schedule:
            case "constant":
                return 1.0
            case "trapezoid":
                return min(1.0, left / _TRAPEZOID_DECAY_SHARE)
            case "cosine":
                return 0.5 * (1 - math.cos(math.pi * left))

    @property
    def epoch_settings(self) -> EpochSettings:
        """The settings that determine the order and augmentation of the epochs."""
        values = {name: getattr(self, name) for name in EpochSettings._fields}
        return EpochSettings(**values | {"augment": resolve_augment(self.augment, self.resize)})

    @property
    def moves_prior(self) -> bool:
        """Whether loss or sampling give the model other shares of the grades than the images have."""
        return self.sampling == "balanced" or self.loss in ("weighted_cross_entropy", "soft_ordinal")

    @property
    def heads(self) -> int:
        """Number of symptoms that the model grades."""
        return len(SYMPTOMS) if self.symptoms == "all" else 1

    @property
    def head(self) -> Head:
        """The head that the loss needs."""
        return "corn" if self.loss == "corn" else "softmax"


def recipe_of_bundle(bundle: str, overrides: list[str]) -> Recipe:
    """Make the recipe that continues the training of a bundle: its recipe, with its weights as initial ones.

    All layers train from the first epoch, because the head is trained. `models://NAME` is replaced by its
    version, so that a resumed run begins with the same weights.

    Args:
        bundle: Bundle or run directory, local or `s3://`, or `models://NAME[@VERSION]`.
        overrides: `key=value` settings that differ.

    Raises:
        UserError: No such bundle, an unknown key, or an invalid value.
    """
    address = pin_version(bundle) if bundle.startswith(SCHEME) else storage.absolute(bundle)
    values = rename_old_keys(load_bundle(address).spec.training.recipe)
    values |= {"weights": address, "frozen_epochs": 0}
    return parse_settings(Recipe, values, f"recipe of {address}", overrides)


def load_recipe(name_or_path: str, folder: Path, overrides: list[str]) -> Recipe:
    """Read a recipe by name (from `folder`), path or URI, then apply `key=value` overrides.

    Raises:
        UserError: No such recipe, an unknown key (the message names the nearest one), or an invalid value.
    """
    values, origin = load_yaml("recipe", name_or_path, folder)
    return parse_settings(Recipe, values, origin, overrides)
