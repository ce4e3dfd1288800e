"""How to train: typed, each field described here, read from YAML with overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import UserError
from scalp_core.model import DEFAULT_ARCHITECTURE
from scalp_core.preprocess import Resize
from scalp_core.settings import parse_overrides, parse_settings


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
    batch_size: int = Field(32, ge=2, description="photographs a step over all workers together")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the schedule, for AdamW")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps that warm up linearly")
    label_smoothing: float = Field(0.05, ge=0, lt=1, description="of the cross-entropy")
    augment: bool = Field(True, description="flips and quarter turns, new in every epoch")
    coverage: float = Field(0.9, gt=0, lt=1, description="promised by the grade sets (conformal)")
    seed: int = Field(0, ge=0, description="of weights, order and augmentation")


def load_recipe(name_or_path: str, folder: Path, overrides: list[str]) -> Recipe:
    """Reads a recipe by name (from `folder`) or by path, then applies `key=value` overrides.

    Raises:
        UserError: no such recipe, an unknown key (the nearest known one is named), or a bad value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"no recipe {name_or_path!r}; give one of {known}, or the path of a .yaml file")
    try:
        values: Any = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold lines of the form key: value")
    return parse_settings(Recipe, values | parse_overrides(overrides), str(path))
