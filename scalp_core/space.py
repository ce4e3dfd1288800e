"""What `scalp tune` varies: a flat YAML of the recipe's keys, each with a list to choose from or a range.

Every draw is a whole recipe and is checked as one before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from scalp_core.errors import UserError
from scalp_core.recipe import Recipe
from scalp_core.settings import load_yaml, parse_settings

_DIGITS = 4  # of a drawn number: what is shown is what is trained with
_DRAWS_A_TRIAL = 1000  # before a space is given up in which hardly any two draws differ


class Range(BaseModel):
    """Numbers from `low` to `high`, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float = Field(description="the smallest")
    high: float = Field(description="the largest")
    scale: Literal["linear", "log"] = Field("linear", description="log: each power of ten is as likely")

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"low ({self.low:g}) must be less than high ({self.high:g}), and both be numbers"
            )
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be more than 0 where the scale is log")
        return self


Space = dict[str, tuple[Any, ...] | Range]

# Only for its keys, which are the recipe's.
_Keys = create_model("_Keys", **dict.fromkeys(Recipe.model_fields, (Any, None)))  # type: ignore[call-overload]


def load_space(name_or_path: str, folder: Path, base: Recipe, fixed: Collection[str] = ()) -> Space:
    """Reads a space by name (from `folder`) or by path, and checks each value as one of the recipe's.

    Args:
        name_or_path: a bundled one's name, or a `.yaml` file, local or `s3://`.
        folder: of the bundled ones.
        base: the recipe whose values are replaced.
        fixed: keys that were set by hand, which are not varied.

    Raises:
        UserError: no such space, an unknown key (the nearest known one is named), or a value that the recipe
            refuses.
    """
    values, origin = load_yaml("space", name_or_path, folder)
    space = parse_space(values, origin, base)
    space = {key: value for key, value in space.items() if key not in fixed}
    if not space:
        raise UserError(f"{origin}: nothing is left to vary; leave out a --set, or add keys to the space")
    return space


def parse_space(values: Mapping[str, Any], origin: str, base: Recipe) -> Space:
    """Checks a space's values against the recipe's declaration; `origin` is named in the message.

    Raises:
        UserError: names the first thing wrong.
    """
    parse_settings(_Keys, dict(values), origin)
    if "epochs" in values:
        raise UserError(
            f"{origin}: epochs cannot vary, for trials are compared after equally many; use --set epochs=…"
        )
    return {key: _parse_values(key, value, origin, base) for key, value in values.items()}


def _parse_values(key: str, value: Any, origin: str, base: Recipe) -> tuple[Any, ...] | Range:
    if isinstance(value, list) and value:
        checked = tuple(getattr(_with(base, {key: each}, origin), key) for each in value)
        if len(set(checked)) < len(checked):
            raise UserError(f"{origin}: {key}: a value is there twice; leave each once")
        return checked
    if not isinstance(value, dict):
        raise UserError(
            f"{origin}: {key}: write a list such as [1, 2], or a range such as {{low: 1, high: 2}}"
        )
    if Recipe.model_fields[key].annotation not in (int, float):
        raise UserError(f"{origin}: {key} is no number, so it has no range; write a list to choose from")
    found = parse_settings(Range, value, f"{origin}: {key}")
    for end in (found.low, found.high):
        _with(base, {key: end}, origin)
    return found


def _with(base: Recipe, settings: Mapping[str, Any], origin: str) -> Recipe:
    return parse_settings(Recipe, base.model_dump() | dict(settings), origin)


def draw(space: Space, base: Recipe, trials: int, seed: int) -> list[dict[str, Any]]:
    """The settings of each trial, no two alike; the same arguments draw the same.

    The first are those of the recipe as it is, to see what the search gains over it.

    Args:
        space: from `load_space`.
        base: the recipe whose values they replace.
        trials: how many.
        seed: of the draws.

    Raises:
        UserError: the space has fewer combinations, or a draw is no recipe.
    """
    unchanged = {key: getattr(base, key) for key in space}
    combinations = math.prod(_size(key, values) for key, values in space.items())
    if not _holds(space, unchanged):
        combinations += 1
    if combinations < trials:
        raise UserError(
            f"--trials {trials}: the space has only {combinations:.0f} combinations; use --trials "
            f"{combinations:.0f}, or give it more values"
        )
    drawn = [unchanged]
    for attempt in range(trials * _DRAWS_A_TRIAL):
        if len(drawn) == trials:
            break
        dice = np.random.default_rng([seed, attempt])
        settings = {key: _draw(key, values, dice) for key, values in space.items()}
        if settings not in drawn:
            recipe = _with(base, settings, f"trial {len(drawn) + 1} of the space")
            drawn.append({key: getattr(recipe, key) for key in space})
    if len(drawn) < trials:
        raise UserError(f"--trials {trials}: the space has hardly as many combinations; use fewer trials")
    return drawn


def _holds(space: Space, settings: dict[str, Any]) -> bool:
    return all(
        settings[key] in values if isinstance(values, tuple) else values.low <= settings[key] <= values.high
        for key, values in space.items()
    )


def _size(key: str, values: tuple[Any, ...] | Range) -> float:
    if isinstance(values, tuple):
        return len(values)
    return values.high - values.low + 1 if Recipe.model_fields[key].annotation is int else math.inf


def _draw(key: str, values: tuple[Any, ...] | Range, dice: np.random.Generator) -> Any:
    if isinstance(values, tuple):
        return values[dice.integers(len(values))]
    if values.scale == "log":
        number = math.exp(dice.uniform(math.log(values.low), math.log(values.high)))
    else:
        number = dice.uniform(values.low, values.high)
    if Recipe.model_fields[key].annotation is int:
        return int(np.clip(round(number), values.low, values.high))
    return float(np.clip(float(f"{number:.{_DIGITS}g}"), values.low, values.high))
