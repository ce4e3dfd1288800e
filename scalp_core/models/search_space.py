"""The search space of `scalp tune`: a flat YAML of recipe keys, each with a list of values or a range.

Each trial is validated as a complete recipe before the search starts. A key without an effect for the drawn
values of the others (`recipe.CONDITIONS`) is not drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from scalp_core.errors import UserError
from scalp_core.models.recipe import CONDITIONS, Condition, Recipe, without_effect
from scalp_core.settings import load_yaml, parse_settings

_DIGITS = 4  # significant digits of a drawn number, so that the shown value is the one in use
_DRAWS_PER_TRIAL = 1000  # limit of attempts in a space where few draws differ


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
            for value in _choices(space, condition.other) or [getattr(base, condition.other)]
        )
    ]


def _choices(space: Space, key: str) -> Iterable[Any]:
    """List the values of a key; a range counts as one of integers."""
    values = space.get(key, ())
    if isinstance(values, tuple):
        return values
    return range(math.ceil(values.low), math.floor(values.high) + 1)


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
            f"{origin}: {key}: write a list such as [1, 2], or a range such as {{low: 1, high: 2}}"
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


def sample_trials(
    space: Space, base: Recipe, trials: int, seed: int, workers: int = 1
) -> list[dict[str, Any]]:
    """Sample the settings of each trial, deterministically; no two trials train identically.

    The first trial is the base recipe, as the baseline of the search. Settings without an effect are omitted.

    Args:
        space: Search space from `load_space`.
        base: Recipe whose values the trials replace.
        trials: Number of trials.
        seed: Random seed for sampling trials.
        workers: Workers per trial.

    Raises:
        UserError: The space has fewer combinations, or a sampled recipe is invalid.
    """
    if (combinations := _count(space, base, workers, trials)) < trials:
        raise UserError(
            f"--trials {trials}: the space has only {combinations} combinations; use --trials "
            f"{combinations}, or add values to the space"
        )
    drawn, effects = [_effective(space, base)], [base.effective_settings(workers)]
    for attempt in range(trials * _DRAWS_PER_TRIAL):
        if len(drawn) == trials:
            break
        rng = np.random.default_rng([seed, attempt])
        settings = {key: _draw(key, values, rng) for key, values in space.items()}
        recipe = with_settings(base, settings, f"trial {len(drawn) + 1} of the space")
        if (effect := recipe.effective_settings(workers)) not in effects:
            drawn.append(_effective(space, recipe))
            effects.append(effect)
    if len(drawn) < trials:
        raise UserError(f"--trials {trials}: the space has too few combinations; use fewer trials")
    return drawn


def _effective(space: Space, recipe: Recipe) -> dict[str, Any]:
    """Select the settings of a recipe that the space varies and that have an effect."""
    idle = without_effect(recipe.model_dump())
    return {key: getattr(recipe, key) for key in space if key not in idle}


def _count(space: Space, base: Recipe, workers: int, enough: int) -> int:
    """Count the recipes of the space that train differently, with `base`, up to `enough`."""
    if any(
        isinstance(values, Range) and Recipe.model_fields[key].annotation is float
        for key, values in space.items()
    ):
        return enough
    effects = [base.effective_settings(workers)]
    for values in itertools.product(*(_choices(space, key) for key in space)):
        if len(effects) == enough:
            break
        effect = with_settings(
            base, dict(zip(space, values, strict=True)), "a trial of the space"
        ).effective_settings(workers)
        if effect not in effects:
            effects.append(effect)
    return len(effects)


def _draw(key: str, values: tuple[Any, ...] | Range, rng: np.random.Generator) -> Any:
    if isinstance(values, tuple):
        return values[rng.integers(len(values))]
    if values.scale == "log":
        number = math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
    else:
        number = rng.uniform(values.low, values.high)
    if Recipe.model_fields[key].annotation is int:
        return int(np.clip(round(number), values.low, values.high))
    return float(np.clip(float(f"{number:.{_DIGITS}g}"), values.low, values.high))
