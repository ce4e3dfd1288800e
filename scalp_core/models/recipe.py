"""How to train: typed, each field described here, read from YAML with overrides from the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core.bundles.bundle import Head
from scalp_core.images.preprocess import Resize
from scalp_core.models.sampler import Augment, EpochSettings, Sampling, resolve_augment
from scalp_core.settings import load_yaml, parse_overrides, parse_settings

BatchNorm = Literal["worker", "sync", "frozen"]
LossName = Literal["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"]

DEFAULT_ARCHITECTURE = "legacy_xception"
FEW_IMAGES = 16
"""Images per worker and step below which `batch_norm: auto` takes the statistics over all workers: Wu and He
(2018) find batch normalization to get worse from there."""

_TRAPEZOID_DECAY_SHARE = 0.3  # of the steps after the warm-up


class Condition(NamedTuple):
    """A setting that has an effect for some values of another setting.

    Args:
        setting: its key.
        other: key of the other setting, declared before it.
        values: of the other setting, for which `setting` has an effect.
        neutral: what `setting` is for its other values.
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
    """The settings that have no effect in a recipe with these values, each with its neutral value."""
    return {each.setting: each.neutral for each in CONDITIONS if not each.is_met(values)}


def _default_smoothing(earlier: Mapping[str, Any]) -> float:
    """From the values of the fields declared before."""
    return without_effect(earlier).get("label_smoothing", 0.05)


class Recipe(BaseModel):
    """A training recipe. Batch size and learning rate are those of the whole run, however many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(DEFAULT_ARCHITECTURE, description="timm name of the classifier")
    weights: str = Field(
        "imagenet", description="first weights: imagenet, none, a .safetensors or .pth file, or s3:// of one"
    )
    size: int = Field(224, ge=32, le=1024, description="side of the square input, pixels")
    resize: Resize = Field("squash", description="how a picture becomes a square: squash, crop or pad")
    epochs: int = Field(12, ge=1, description="passes over the training part")
    frozen_epochs: int = Field(0, ge=0, description="the first of them, in which the last layer alone learns")
    batch_size: int = Field(32, ge=2, description="photographs a step over all workers together")
    accumulate: int = Field(1, ge=1, description="pieces of a worker's share of the batch, one after another")
    optimiser: Literal["adamw", "adam"] = Field("adamw", description="adam is the paper's")
    learning_rate: float = Field(
        1e-3, gt=0, description="peak of the schedule for this batch_size; more workers do not change either"
    )
    schedule: Literal["cosine", "trapezoid", "constant"] = Field(
        "cosine", description="after the warm-up; trapezoid: constant, then in a line to zero"
    )
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps that warm up linearly")
    weight_decay: float = Field(0.05, ge=0, description="of all weights but biases and normalization")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each layer learns at this times the rate of the one above it"
    )
    loss: LossName = Field(
        "cross_entropy", description="cross_entropy, weighted_cross_entropy, corn or soft_ordinal"
    )
    label_smoothing: float = Field(
        default_factory=_default_smoothing,
        ge=0,
        lt=1,
        description="of the two cross-entropies: 0.05 unless set",
    )
    softness: float = Field(1.0, gt=0, description="of soft_ordinal: how far labels spread over the grades")
    sampling: Sampling = Field(
        "natural", description="balanced: every grade is shown equally often, rare ones again and again"
    )
    augment: Augment = Field(
        "auto",
        description="flips: one of four flips per image and epoch; dihedral: one of eight flips and quarter "
        "turns; x4: the paper's, every image and three flips of it per epoch; none; auto: flips where resize "
        "is squash, for a quarter turn would stretch what was squashed, else dihedral",
    )
    colour_jitter: float = Field(
        0.0, ge=0, le=0.5, description="largest change of brightness, contrast and each color; 0 is off"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="of the moving average of the weights that is kept; 0 is off"
    )
    batch_norm: Literal["auto", BatchNorm] = Field(
        "auto",
        description="statistics over each worker's images, over all workers (sync), or those of the first "
        f"weights (frozen); auto: sync where a worker has fewer than {FEW_IMAGES} at a time, else worker",
    )
    gradient_clip: float = Field(
        1.0, ge=0, description="largest norm of a step's gradient, over all weights; 0 is off"
    )
    coverage: float = Field(0.9, gt=0, lt=1, description="promised by the grade sets (conformal)")
    seed: int = Field(0, ge=0, description="of weights, order and augmentation")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.frozen_epochs >= self.epochs:
            raise ValueError(
                f"frozen_epochs ({self.frozen_epochs}) must be fewer than epochs ({self.epochs})"
            )
        if self.batch_norm == "frozen" and self.weights == "none":
            raise ValueError("batch_norm: frozen needs pretrained weights, and weights is none")
        for setting, other, values, neutral in CONDITIONS:
            value, of_other = getattr(self, setting), getattr(self, other)
            if of_other not in values and value != neutral:
                raise ValueError(
                    f"{setting} ({value:g}) has no effect with {other}: {of_other}; use "
                    f"{setting}={neutral:g}, or {' or '.join(f'{other}={each}' for each in values)}"
                )
        return self

    def effective_settings(self, workers: int) -> dict[str, Any]:
        """What the training depends on: recipes of one effect train alike on so many workers."""
        resolved = {"augment": self.epoch_settings.augment, "batch_norm": self.resolve_batch_norm(workers)}
        return self.model_dump(exclude={"coverage"}) | resolved

    def resolve_batch_norm(self, workers: int) -> BatchNorm:
        """What `batch_norm` is for so many workers; one has nobody to synchronize with."""
        if self.batch_norm == "frozen":
            return "frozen"
        few = self.batch_size // workers // self.accumulate < FEW_IMAGES
        wanted = self.batch_norm == "sync" or (self.batch_norm == "auto" and few)
        return "sync" if workers > 1 and wanted else "worker"

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """The factor of `learning_rate` at a step, the first is 0, of so many in the run."""
        warm = int(steps * self.warmup_share)
        if step < warm:
            return (step + 1) / warm
        left = max(0.0, (steps - step) / max(1, steps - warm))
        match self.schedule:
            case "constant":
                return 1.0
            case "trapezoid":
                return min(1.0, left / _TRAPEZOID_DECAY_SHARE)
            case "cosine":
                return 0.5 * (1 - math.cos(math.pi * left))

    @property
    def epoch_settings(self) -> EpochSettings:
        """What of it decides on the epochs."""
        values = {name: getattr(self, name) for name in EpochSettings._fields}
        return EpochSettings(**values | {"augment": resolve_augment(self.augment, self.resize)})

    @property
    def head(self) -> Head:
        """What the model's last layer is for this loss."""
        return "corn" if self.loss == "corn" else "softmax"


def load_recipe(name_or_path: str, folder: Path, overrides: list[str]) -> Recipe:
    """Reads a recipe by name (from `folder`) or by path or uri, then applies `key=value` overrides.

    Raises:
        UserError: no such recipe, an unknown key (the nearest known one is named), or a bad value.
    """
    values, origin = load_yaml("recipe", name_or_path, folder)
    return parse_settings(Recipe, values | parse_overrides(overrides), origin)
