"""What `scalp tune` varies: a flat YAML of the recipe's keys, each with a list to choose from or a range.

Every draw is a whole recipe and is checked as one before anything starts. A key that has no effect for the
drawn values of the others (`recipe.CONDITIONS`) is not drawn.
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

_FIXED = {
    "epochs": "trials are compared after equally many",
    "coverage": "it comes after training, and trials are compared by their kappa",
}

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
    for condition in _never_met(space, base):  # by what was set by hand: else parse_space refuses it
        del space[condition.setting]
    if not space:
        raise UserError(f"{origin}: nothing is left to vary; leave out a --set, or add keys to the space")
    return space


def parse_space(values: Mapping[str, Any], origin: str, base: Recipe) -> Space:
    """Checks a space's values against the recipe's declaration; `origin` is named in the message.

    Raises:
        UserError: names the first thing wrong.
    """
    parse_settings(_Keys, dict(values), origin)
    for key, reason in _FIXED.items():
        if key in values:
            raise UserError(f"{origin}: {key} cannot vary: {reason}; use --set {key}=…")
    space = {key: _parse_values(key, value, origin, base) for key, value in values.items()}
    for condition in _never_met(space, base):
        setting, other, needed, _ = condition
        raise UserError(
            f"{origin}: {setting} has no effect, for {other} is never {' or '.join(needed)}; leave it out, "
            f"or add such a value to {other}"
        )
    return space


def _never_met(space: Space, base: Recipe) -> list[Condition]:
    """Conditions of the space's keys that no draw can meet."""
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
    """The values of a key that can be listed."""
    values = space.get(key, ())
    if isinstance(values, tuple):
        return values
    return range(math.ceil(values.low), math.floor(values.high) + 1)


def _parse_values(key: str, value: Any, origin: str, base: Recipe) -> tuple[Any, ...] | Range:
    # Checked where it has an effect.
    effective = {each.other: each.values[0] for each in CONDITIONS if each.setting == key}
    if isinstance(value, list) and value:
        checked = tuple(getattr(with_settings(base, effective | {key: each}, origin), key) for each in value)
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
        with_settings(base, effective | {key: end}, origin)
    return found


def with_settings(base: Recipe, settings: Mapping[str, Any], origin: str) -> Recipe:
    """A recipe with other settings. What has no effect with them is neutral; defaults follow them.

    Raises:
        UserError: they are no recipe; the message names `origin`.
    """
    idle = without_effect(base.model_dump() | dict(settings))
    values = base.model_dump(exclude_unset=True) | dict(settings)
    return parse_settings(Recipe, {key: value for key, value in values.items() if key not in idle}, origin)


def sample_trials(
    space: Space, base: Recipe, trials: int, seed: int, workers: int = 1
) -> list[dict[str, Any]]:
    """The settings of each trial, no two of which train alike; the same arguments draw the same.

    The first are those of the recipe as it is, to see what the search gains over it. A trial has no setting
    without an effect.

    Args:
        space: from `load_space`.
        base: the recipe whose values they replace.
        trials: how many.
        seed: of the draws.
        workers: of each trial.

    Raises:
        UserError: the space has fewer combinations, or a draw is no recipe.
    """
    if (combinations := _count(space, base, workers, trials)) < trials:
        raise UserError(
            f"--trials {trials}: the space has only {combinations} combinations; use --trials "
            f"{combinations}, or give it more values"
        )
    drawn, effects = [_effective(space, base)], [base.effective_settings(workers)]
    for attempt in range(trials * _DRAWS_A_TRIAL):
        if len(drawn) == trials:
            break
        dice = np.random.default_rng([seed, attempt])
        settings = {key: _draw(key, values, dice) for key, values in space.items()}
        recipe = with_settings(base, settings, f"trial {len(drawn) + 1} of the space")
        if (effect := recipe.effective_settings(workers)) not in effects:
            drawn.append(_effective(space, recipe))
            effects.append(effect)
    if len(drawn) < trials:
        raise UserError(f"--trials {trials}: the space has hardly as many combinations; use fewer trials")
    return drawn


def _effective(space: Space, recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that the space varies and that have an effect."""
    idle = without_effect(recipe.model_dump())
    return {key: getattr(recipe, key) for key in space if key not in idle}


def _count(space: Space, base: Recipe, workers: int, enough: int) -> int:
    """How many recipes that train differently the space has, with `base`; counted up to `enough`."""
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
