"""Proposals of settings for trials of `scalp tune`, by Optuna's TPE (tree-structured Parzen estimator)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from jobs.tune.trials import METRIC, Trial
from scalp_core.errors import UserError
from scalp_core.models.recipe import Recipe
from scalp_core.models.search_space import Range, Space, select_settings, with_settings

# On an artificial kappa of six settings, the best of 32 trials was 0.025 below the maximum by random search,
# and 0.011 with 6 random trials (mean of 60 searches).
_RANDOM_TRIALS = 6
_DIGITS = 4  # significant digits of a proposed number, so that the shown value is the one in use
# Proposals for one trial. TPE may repeat trials of a small space, so the later proposals are random.
_TPE_PROPOSALS, _PROPOSALS = 20, 1000

optuna.logging.set_verbosity(optuna.logging.WARNING)


def plan_trials(space: Space, base: Recipe, count: int, workers: int, seed: int) -> list[Trial]:
    """Propose trials without results, to check their settings before the search.

    Raises:
        UserError: The space has fewer combinations.
    """
    trials: list[Trial] = []
    while len(trials) < count:
        settings = propose(len(trials) + 1, space, base, trials, workers, seed)
        if settings is None:
            raise UserError(
                f"--trials {count}: the space has only {len(trials)} combinations; "
                f"use --trials {len(trials)}, or add values to the space"
            )
        trials.append(Trial(len(trials) + 1, settings))
    return trials


def propose(
    number: int, space: Space, base: Recipe, trials: Sequence[Trial], workers: int, seed: int
) -> dict[str, Any] | None:
    """Propose the settings of a trial: the base recipe's, then random ones, then by TPE from earlier trials.

    Settings without an effect are omitted. The same arguments give the same proposal.

    Args:
        number: Number of the trial; 1 is the base recipe.
        space: Settings that vary.
        base: Recipe whose values the trials replace.
        trials: Trials so far; no proposal trains like one of them.
        workers: Workers per trial.
        seed: Random seed of the search.

    Returns:
        The settings, or None if no combination is left.
    """
    if number == 1:
        return select_settings(space, base)
    distributions = {key: _distribution(key, values) for key, values in space.items()}
    study = optuna.create_study(direction="maximize")
    # TPE takes running trials as bad ones, so that parallel trials differ.
    study.add_trials([_frozen(trial, space, distributions) for trial in trials if trial.status != "waiting"])
    known = [with_settings(base, trial.settings, "").effective_settings(workers) for trial in trials]
    for attempt in range(_PROPOSALS):
        state = int(np.random.SeedSequence([seed, number, attempt]).generate_state(1)[0])
        study.sampler = (
            TPESampler(seed=state, n_startup_trials=_RANDOM_TRIALS, multivariate=True, constant_liar=True)
            if attempt < _TPE_PROPOSALS
            else RandomSampler(state)
        )
        proposal = study.ask(distributions)
        study.tell(proposal, state=TrialState.FAIL)  # not a trial until its record is
        settings = {key: _round(space[key], value) for key, value in proposal.params.items()}
        try:
            recipe = with_settings(base, settings, "")
        except UserError:
            continue  # the values are valid, but not together
        if recipe.effective_settings(workers) not in known:
            return select_settings(space, recipe)
    return None


def _distribution(key: str, values: tuple[Any, ...] | Range) -> BaseDistribution:
    if isinstance(values, tuple):
        return CategoricalDistribution(values)
    if Recipe.model_fields[key].annotation is int:
        return IntDistribution(int(values.low), int(values.high), log=values.scale == "log")
    return FloatDistribution(values.low, values.high, log=values.scale == "log")


def _round(values: tuple[Any, ...] | Range, value: Any) -> Any:
    if isinstance(values, tuple) or isinstance(value, int):
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), values.low), values.high)


def _frozen(trial: Trial, space: Space, distributions: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """Convert a trial to one of Optuna; TPE takes a failed one as stopped, so that it avoids its settings."""
    # The base recipe may have values outside the space.
    params = {key: value for key, value in trial.settings.items() if _holds(space[key], value)}
    state = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.PRUNED}
    return optuna.create_trial(
        state=state.get(trial.status, TrialState.RUNNING),
        value=trial.best[METRIC] if trial.best and trial.status == "finished" else None,
        params=params,
        distributions={key: distributions[key] for key in params},
        intermediate_values={entry["epoch"]: entry[METRIC] for entry in trial.history},
    )


def _holds(values: tuple[Any, ...] | Range, value: Any) -> bool:
    return value in values if isinstance(values, tuple) else values.low <= value <= values.high
