"""The search space of `scalp tune`: a flat YAML of recipe keys, each with a list of values or a range.

A key without an effect for the drawn values of the others (`recipe.CONDITIONS`) is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from scalp_core.errors import UserError
from scalp_core.models.recipe import CONDITIONS, Condition, Recipe, without_effect
from scalp_core.settings import load_yaml, parse_settings


class Range(BaseModel):
    """A range of numbers from `low` to `high`, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    scale: Literal["linear", "log"] = Field("linear", description="log: each power of ten is equally likely")

    @model_validator(mode="after")
    def _check_bounds(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g}), and both finite")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be more than 0 if the scale is log")
        return self


Space = dict[str, tuple[Any, ...] | Range]

_FIXED = {
    "epochs": "trials are compared after equally many epochs",
    "coverage": "it has no effect on kappa, by which trials are compared",
    "referral": "it has no effect on kappa, by which trials are compared",
    "model": "it holds several values",
}

# Only to validate the keys, which are those of the recipe.
_Keys = create_model("_Keys", **dict.fromkeys(Recipe.model_fields, (Any, None)))  # type: ignore[call-overload]


def load_space(name_or_path: str, folder: Path, base: Recipe, fixed: Collection[str] = ()) -> Space:
    """Read a search space by name (from `folder`) or path, and validate its values as those of the recipe.

    Args:
        name_or_path: Name of a space in `folder`, or a `.yaml` file, local or `s3://`.
        folder: Folder of the spaces that are part of scalp.
        base: Recipe whose values the trials replace.
        fixed: Keys that the user set, which do not vary.

    Raises:
        UserError: No such space, an unknown key (the message names the nearest one), or an invalid value.
    """
    values, origin = load_yaml("space", name_or_path, folder)
    space = parse_space(values, origin, base)
    space = {key: value for key, value in space.items() if key not in fixed}
    for condition in _never_met(space, base):  # because of `fixed`: parse_space rejects other cases
        del space[condition.setting]
    if not space:
        raise UserError(f"{origin}: no key is left to vary; omit a --set, or add keys to the space")
    return space


def parse_space(values: Mapping[str, Any], origin: str, base: Recipe) -> Space:
    """Validate the values of a space against the recipe's fields.

    Raises:
        UserError: A key or value is invalid; the message begins with `origin`.
    """
    parse_settings(_Keys, dict(values), origin)
    for key, reason in _FIXED.items():
        if key in values:
            raise UserError(f"{origin}: {key} cannot vary: {reason}; use --set {key}=…")
    space = {key: _parse_values(key, value, origin, base) for key, value in values.items()}
    for condition in _never_met(space, base):
        setting, other, needed, _ = condition
        raise UserError(
            f"{origin}: {setting} has no effect, because {other} is never {' or '.join(needed)}; omit it, "
            f"or add such a value to {other}"
        )
    return space


def _never_met(space: Space, base: Recipe) -> list[Condition]:
    """Find the conditions of the space's keys that no trial can meet."""
    return [
        condition
        for condition in CONDITIONS
        if condition.setting in space
        and not any(
            condition.is_met({condition.other: value})
            for value in space.get(condition.other, (getattr(base, condition.other),))
        )
    ]


def _parse_values(key: str, value: Any, origin: str, base: Recipe) -> tuple[Any, ...] | Range:
    # Validated in a recipe in which the key has an effect.
    effective = {condition.other: condition.values[0] for condition in CONDITIONS if condition.setting == key}
    if isinstance(value, list) and value:
        recipes = (with_settings(base, effective | {key: choice}, origin) for choice in value)
        checked = tuple(getattr(recipe, key) for recipe in recipes)
        if len(set(checked)) < len(checked):
            raise UserError(f"{origin}: {key}: a value occurs twice; keep one of each")
        return checked
    if not isinstance(value, dict):
        raise UserError(
            f"{origin}: {key} has no values; write a list such as [1, 2], or a range {{low: 1, high: 2}}"
        )
    if Recipe.model_fields[key].annotation not in (int, float):
        raise UserError(f"{origin}: {key} is not a number, so it cannot have a range; write a list of values")
    bounds = parse_settings(Range, value, f"{origin}: {key}")
    for end in (bounds.low, bounds.high):
        with_settings(base, effective | {key: end}, origin)
    return bounds


def with_settings(base: Recipe, settings: Mapping[str, Any], origin: str) -> Recipe:
    """Return the recipe with other settings; settings without an effect then become neutral.

    Raises:
        UserError: The settings are invalid; the message begins with `origin`.
    """
    idle = without_effect(base.model_dump() | dict(settings))
    values = base.model_dump(exclude_unset=True) | dict(settings)
    return parse_settings(Recipe, {key: value for key, value in values.items() if key not in idle}, origin)


def select_settings(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Select the settings of a recipe that the space varies and that have an effect."""
    idle = without_effect(recipe.model_dump())
    return {key: getattr(recipe, key) for key in space if key not in idle}
