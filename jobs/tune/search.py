"""The state of a search of `scalp tune`: one actor has it for the driver and the workers of all trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.data.tasks import RETRY_TIMEOUT_S
from jobs.tune.proposals import propose
from jobs.tune.trials import Trial, is_stopped, load_trials, save_trial
from scalp_core import storage
from scalp_core.models.recipe import Recipe
from scalp_core.models.search_space import Space


class Search:
    """The state of a search: starts trials, records their epochs, and decides which ones stop early.

    Args:
        out: Output directory of the search, with the records of an earlier run.
        space: Settings that vary.
        base: Recipe of the first trial.
        count: Number of trials.
        workers: Workers per trial.
        seed: Random seed of the proposals.
    """

    def __init__(self, out: str, space: Space, base: Recipe, count: int, workers: int, seed: int) -> None:
        self._out = out
        self._space = space
        self._base = base
        self._count = count
        self._workers = workers
        self._seed = seed
        self._trials = {trial.number: trial for trial in load_trials(out, count)}

    def trials(self) -> list[Trial]:
        """List the trials that were started."""
        return list(self._trials.values())

    def start_next(self) -> Trial | None:
        """Start a trial: one that an earlier run began, otherwise a new one; None after the last."""
        waiting = [trial for trial in self.trials() if trial.status == "waiting"]
        if waiting:
            trial = min(waiting, key=lambda trial: (not trial.history, trial.number))
        else:
            number = next((n for n in range(1, self._count + 1) if n not in self._trials), None)
            if number is None:
                return None
            settings = propose(number, self._space, self._base, self.trials(), self._workers, self._seed)
            if settings is None:
                return None
            trial = self._trials[number] = Trial(number, settings)
        trial.status = "running"
        self._save(trial)
        return trial

    def add_epoch(self, number: int, entry: Mapping[str, Any]) -> bool:
        """Record an epoch of a trial, and return whether the trial ends after it."""
        trial = self._trials[number]
        trial.add(entry)
        if entry["epoch"] == self._base.epochs:
            trial.status = "finished"
        elif is_stopped(trial, self.trials(), self._base.epochs):
            trial.status = "stopped"
        self._save(trial)
        return trial.is_over

    def end(self, number: int, failure: str | None) -> Trial:
        """Record the reason if a trial failed, and return the trial."""
        trial = self._trials[number]
        if failure and not trial.is_over:
            trial.status, trial.reason = "failed", failure
            self._save(trial)
        return trial

    def _save(self, trial: Trial) -> None:
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            save_trial(self._out, trial)
