"""The trials of `scalp tune`: each one is a training of Ray Train inside a trial of Ray Tune.

What is known of a trial is a file of ours, written after each of its epochs. Tune's own state is not gone on
from: it holds pickles, and neither it nor ASHA's memory would survive another version of Ray.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.tune import Callback
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from rich.progress import Progress, TaskID

from cluster import reservations
from jobs.common.console import console, read_json, write_json
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.settings import rename_old_keys

METRIC = "val_qwk"
# Each rung lets the best third go on.
REDUCTION = 3

# Fewer than of a training: settings that cannot work fail again and again.
_MAX_WORKER_FAILURES = 1
_FREE_EVERY_S = 2.0

_KEPT = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_qwk", "learning_rate", "seconds")
_TRIALS_FOLDER = "trials"


@dataclass
class Trial:
    """One trial: what it is, how far it came and what came out.

    Args:
        number: from 1.
        settings: what it changes of the recipe.
        status: waiting, running, finished, stopped (early, by ASHA) or failed.
        reason: of a failure, in a line.
        history: one entry an epoch, in order.
    """

    number: int
    settings: dict[str, Any]
    status: str = "waiting"
    reason: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether it needs no more training; a failed one is tried again by the next run."""
        return self.status in ("finished", "stopped")

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry of the epoch with the highest validation kappa, the earliest of equals."""
        return max(self.history, key=lambda entry: entry[METRIC], default=None)

    @property
    def label(self) -> str:
        return f"{self.number:03d}"

    def add(self, entry: Mapping[str, Any]) -> None:
        """An epoch, in place of what is known of it: a lost worker's epoch is done twice."""
        kept = {name: entry[name] for name in _KEPT}
        others = [known for known in self.history if known["epoch"] != kept["epoch"]]
        self.history = sorted([*others, kept], key=lambda known: known["epoch"])


@dataclass(frozen=True)
class Plan:
    """What a trial's processes need.

    Args:
        folder: for its checkpoints.
        config: for `train_worker`.
        scaling: its workers.
        history: the epochs that it has behind it, of a search that was stopped.
    """

    folder: str
    config: dict[str, Any]
    scaling: ScalingConfig
    history: list[dict[str, Any]]


class _DiscardedNotes:
    """In place of the queue of notes: a search shows epochs, not steps."""

    def put_nowait(self, note: dict[str, Any]) -> None:
        """Drops it."""


def run_trial(config: dict[str, Any], plans: dict[int, Plan]) -> None:
    """What Tune runs: reports the epochs already done, then trains on from the last checkpoint.

    Raises:
        RuntimeError: training failed; the message is the reason in one line.
    """
    # Imports PyTorch, which the driver of the search does not need.
    from jobs.train.trainer import divergence_message, make_trainer

    plan = plans[config["trial"]]
    for entry in plan.history:
        tune.report(entry)
    training = make_trainer(
        plan.config | {"notes": _DiscardedNotes()},
        plan.folder,
        plan.scaling,
        checkpoint_config=CheckpointConfig(num_to_keep=1),
        failure_config=FailureConfig(max_failures=_MAX_WORKER_FAILURES),
        callbacks=[TuneReportCallback()],
    )
    try:
        result = training.fit()
    except TrainingFailedError as error:
        raise RuntimeError(str(error).strip().splitlines()[-1]) from None
    if reason := divergence_message(result):
        raise RuntimeError(reason)


def make_asha(epochs: int, grace: int, over: list[Trial]) -> ASHAScheduler:
    """Stops after `grace` epochs, and after each three times as many, what is not among the best third.

    Args:
        epochs: of a trial that is never stopped.
        grace: epochs that every trial gets.
        over: trials of a search that goes on, which count for the others.
    """
    scheduler = ASHAScheduler(
        time_attr="epoch", metric=METRIC, mode="max", max_t=epochs, grace_period=grace,
        reduction_factor=REDUCTION,
    )  # fmt: skip
    for known in over:
        stands_for = SimpleNamespace(trial_id=f"earlier-{known.label}")
        scheduler.on_trial_add(None, stands_for)
        for entry in known.history:
            scheduler.on_trial_result(None, stands_for, entry)
    return scheduler


def load_trials(out: str, drawn: list[dict[str, Any]]) -> list[Trial]:
    """The trials with what an earlier run of the same search knows of them.

    Raises:
        UserError: a record is of other settings, as another version may draw them.
    """
    trials = []
    for number, settings in enumerate(drawn, 1):
        trial = Trial(number, settings)
        if known := read_json(_record(out, trial)):
            trial = Trial(**known | {"settings": rename_old_keys(known["settings"])})
            if trial.settings != settings:
                raise UserError(f"{_record(out, trial)} is of another trial; choose another OUT")
            if not trial.is_over:
                trial.status, trial.reason = "waiting", ""
        trials.append(trial)
    return trials


def _record(out: str, trial: Trial) -> str:
    return storage.join(out, _TRIALS_FOLDER, f"{trial.label}.json")


def work_folder(work: str, trial: Trial) -> str:
    """Where its checkpoints are while it runs, in the search's scratch folder."""
    return storage.join(work, trial.label)


class TrialRecorder(Callback):
    """Keeps what the trials report, and shows it: the bar, and a line for each that ends.

    Args:
        out: the search's directory.
        work: its scratch folder.
        trials: by number.
        epochs: of a trial that is never stopped.
        bar: a progress bar over the epochs of all trials, and its task.
    """

    def __init__(
        self, out: str, work: str, trials: dict[int, Trial], epochs: int, bar: tuple[Progress, TaskID]
    ) -> None:
        self._out = out
        self._work = work
        self._trials = trials
        self._epochs = epochs
        self._progress, self._task = bar
        self._freed = 0.0
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune keeps a copy of what it was asked for, and a bar cannot be copied."""
        return {}

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        own = self._trials[trial.config["trial"]]
        own.status, own.reason = "running", ""
        self._show()

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        own = self._trials[trial.config["trial"]]
        own.add(result)
        self._keep(own)

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        own = self._trials[trial.config["trial"]]
        epochs = own.history[-1]["epoch"] if own.history else 0
        own.status = "finished" if epochs >= self._epochs else "stopped"
        self._keep(own)
        storage.remove_folder(work_folder(self._work, own))
        console.print(f"trial {own.number} {own.status} after epoch {epochs}/{self._epochs}: {_told(own)}")

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        own = self._trials[trial.config["trial"]]
        own.status, own.reason = "failed", _reason(Path(trial.error_file).read_text())
        self._keep(own)
        console.print(f"trial {own.number} failed: {own.reason}  ({format_settings(own.settings)})")

    def on_step_end(self, **_: Any) -> None:
        if time.monotonic() - self._freed > _FREE_EVERY_S:
            reservations.remove_orphaned_placement_groups()
            self._freed = time.monotonic()

    def _keep(self, trial: Trial) -> None:
        write_json(_record(self._out, trial), asdict(trial))
        self._show()

    def _show(self) -> None:
        done = sum(
            self._epochs if trial.is_over or trial.status == "failed" else len(trial.history)
            for trial in self._trials.values()
        )
        running = sum(trial.status == "running" for trial in self._trials.values())
        found = [trial.best[METRIC] for trial in self._trials.values() if trial.best]
        best = f", best QWK {max(found):.3f}" if found else ""
        self._progress.update(self._task, completed=done, note=f"{running} running{best}")


def _told(trial: Trial) -> str:
    if trial.best is None:
        return format_settings(trial.settings)
    return f"QWK {trial.best[METRIC]:.3f}  ({format_settings(trial.settings)})"


def format_settings(settings: Mapping[str, Any]) -> str:
    """`learning_rate 0.001, loss corn`."""
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _reason(text: str) -> str:
    """The line that names the error, of the traceback that Tune keeps."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b[^:]*: ", line)]
    return (named[-1] if named else lines[0]).removeprefix("RuntimeError: ")
