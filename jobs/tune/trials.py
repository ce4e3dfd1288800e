"""The trials of `scalp tune`: their records, and the rule that stops the worst ones early (ASHA).

The record of a trial is a file, written after each of its epochs. Proposals and early stopping depend on the
records alone: a resumed search needs no state of Optuna or Ray, which another version could not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jobs.common.console import read_json, write_json
from scalp_core import storage
from scalp_core.settings import rename_old_keys

METRIC = "val_qwk"
REDUCTION = 3  # each rung of ASHA continues the best third
_GRACE_SHARE = 0.25  # share of the epochs before ASHA stops trials

_KEPT = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_qwk", "learning_rate", "seconds")


@dataclass
class Trial:
    """The record of a trial: settings, status and history.

    Args:
        number: Number of the trial, from 1.
        settings: Changes to the recipe.
        status: waiting, running, finished, stopped (early, by ASHA) or failed.
        reason: Reason of a failure, in one line.
        history: One entry per epoch, in order.
    """

    number: int
    settings: dict[str, Any]
    status: str = "waiting"
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the trial is finished or stopped; the next run retries failed ones."""
        return self.status in ("finished", "stopped")

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of the epoch with the highest validation kappa, the earliest of equals."""
        return max(self.history, key=lambda entry: entry[METRIC], default=None)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch, or replace it: after a lost worker, an epoch runs twice."""
        new_entry = {name: entry[name] for name in _KEPT}
        others = [known for known in self.history if known["epoch"] != new_entry["epoch"]]
        self.history = sorted([*others, new_entry], key=lambda known: known["epoch"])


def load_trials(out: str, count: int) -> list[Trial]:
    """Read the records of an earlier run of the same search; unfinished and failed trials are waiting."""
    trials = []
    for number in range(1, count + 1):
        if record := read_json(_record(out, number)):
            trial = Trial(**record | {"settings": rename_old_keys(record["settings"])})
            if not trial.is_over:
                trial.status, trial.reason = "waiting", ""
            trials.append(trial)
    return trials


def save_trial(out: str, trial: Trial) -> None:
    """Write the record of a trial."""
    write_json(_record(out, trial.number), asdict(trial))


def _record(out: str, number: int) -> str:
    return storage.join(out, "trials", f"{number:03d}.json")


def first_rung(epochs: int) -> int:
    """Return the first epoch after which ASHA stops trials."""
    return max(1, round(epochs * _GRACE_SHARE))


def is_stopped(trial: Trial, trials: Iterable[Trial], epochs: int) -> bool:
    """Whether asynchronous successive halving (ASHA, Li et al. 2020) stops a trial after its last epoch.

    At a rung a trial continues if its kappa is in the best third of those that reached the rung so far.

    Args:
        trial: Trial with at least one epoch.
        trials: Trials to compare with.
        epochs: Epochs of a trial that is not stopped.
    """
    last, rung = trial.history[-1], first_rung(epochs)
    while rung < last["epoch"]:
        rung *= REDUCTION
    earlier = [
        entry[METRIC]
        for other in trials
        if other.number != trial.number
        for entry in other.history
        if entry["epoch"] == rung
    ]
    return rung == last["epoch"] and bool(earlier) and last[METRIC] < np.quantile(earlier, 1 - 1 / REDUCTION)
