"""The trials of `scalp tune`: each is a training by Ray Train inside a trial of Ray Tune.

The record of a trial is a file of scalp, written after each of its epochs. A search does not resume from
Tune's state, because it contains pickles, and another version of Ray could read neither it nor ASHA's state.
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
# Each rung of ASHA continues the best third.
REDUCTION = 3

# Fewer than in a training, because invalid settings fail repeatedly.
_MAX_WORKER_FAILURES = 1
_FREE_EVERY_S = 2.0

_KEPT = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_qwk", "learning_rate", "seconds")
_TRIALS_FOLDER = "trials"


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

    @property
    def label(self) -> str:
        return f"{self.number:03d}"

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch, or replace it: after a lost worker, an epoch runs twice."""
        new_entry = {name: entry[name] for name in _KEPT}
        others = [known for known in self.history if known["epoch"] != new_entry["epoch"]]
        self.history = sorted([*others, new_entry], key=lambda known: known["epoch"])


@dataclass(frozen=True)
class Plan:
    """The plan of a trial, which its process receives.

    Args:
        folder: Folder for checkpoints.
        config: Configuration of `train_worker`.
        scaling: Number and resources of the workers.
        history: Epochs that a stopped search has completed.
    """

    folder: str
    config: dict[str, Any]
    scaling: ScalingConfig
    history: list[dict[str, Any]]


class _DiscardedNotes:
    """A queue that discards notes: a search shows epochs, not steps."""

    def put_nowait(self, note: dict[str, Any]) -> None:
        """Discard a note."""


def run_trial(config: dict[str, Any], plans: dict[int, Plan]) -> None:
    """Run a trial inside Tune: report the completed epochs, then resume from the last checkpoint.

    Raises:
        RuntimeError: Training failed; the message is the reason in one line.
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


def make_asha(epochs: int, grace: int, finished: list[Trial]) -> ASHAScheduler:
    """Make the scheduler that stops trials outside the best third at epochs `grace`, 3 `grace`, 9 `grace`, …

    Args:
        epochs: Epochs of a trial that is not stopped.
        grace: Minimum epochs of each trial.
        finished: Finished trials of a resumed search, which the scheduler compares with the others.
    """
    scheduler = ASHAScheduler(
        time_attr="epoch", metric=METRIC, mode="max", max_t=epochs, grace_period=grace,
        reduction_factor=REDUCTION,
    )  # fmt: skip
    for trial in finished:
        substitute = SimpleNamespace(trial_id=f"earlier-{trial.label}")
        scheduler.on_trial_add(None, substitute)
        for entry in trial.history:
            scheduler.on_trial_result(None, substitute, entry)
    return scheduler


def load_trials(out: str, drawn: list[dict[str, Any]]) -> list[Trial]:
    """Make the trials, with the records of an earlier run of the same search.

    Raises:
        UserError: A record has other settings, for example because another version sampled them.
    """
    trials = []
    for number, settings in enumerate(drawn, 1):
        trial = Trial(number, settings)
        if known := read_json(_record(out, trial)):
            trial = Trial(**known | {"settings": rename_old_keys(known["settings"])})
            if trial.settings != settings:
                raise UserError(
                    f"{_record(out, trial)} has other settings than the trial; choose another OUT"
                )
            if not trial.is_over:
                trial.status, trial.reason = "waiting", ""
        trials.append(trial)
    return trials


def _record(out: str, trial: Trial) -> str:
    return storage.join(out, _TRIALS_FOLDER, f"{trial.label}.json")


def work_folder(work: str, trial: Trial) -> str:
    """Return the folder for a trial's checkpoints, in the scratch folder of the search."""
    return storage.join(work, trial.label)


class TrialRecorder(Callback):
    """Record and print the reports of trials: the progress bar, and one line per ended trial.

    Args:
        out: Output directory of the search.
        work: Scratch folder of the search.
        trials: Trials by number.
        epochs: Epochs of a trial that is not stopped.
        bar: Progress bar over the epochs of all trials, and its task.
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
        """Return no state: Tune copies its configuration, and a progress bar cannot be copied."""
        return {}

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        record = self._trials[trial.config["trial"]]
        record.status, record.reason = "running", ""
        self._show()

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        record = self._trials[trial.config["trial"]]
        record.add(result)
        self._save(record)

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        record = self._trials[trial.config["trial"]]
        epochs = record.history[-1]["epoch"] if record.history else 0
        record.status = "finished" if epochs >= self._epochs else "stopped"
        self._save(record)
        storage.remove_folder(work_folder(self._work, record))
        console.print(
            f"trial {record.number} {record.status} after epoch {epochs}/{self._epochs}: {_describe(record)}"
        )

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        record = self._trials[trial.config["trial"]]
        record.status, record.reason = "failed", _reason(Path(trial.error_file).read_text())
        self._save(record)
        console.print(f"trial {record.number} failed: {record.reason}  ({format_settings(record.settings)})")

    def on_step_end(self, **_: Any) -> None:
        if time.monotonic() - self._freed > _FREE_EVERY_S:
            reservations.remove_orphaned_placement_groups()
            self._freed = time.monotonic()

    def _save(self, trial: Trial) -> None:
        write_json(_record(self._out, trial), asdict(trial))
        self._show()

    def _show(self) -> None:
        done = sum(
            self._epochs if trial.is_over or trial.status == "failed" else len(trial.history)
            for trial in self._trials.values()
        )
        running = sum(trial.status == "running" for trial in self._trials.values())
        kappas = [trial.best[METRIC] for trial in self._trials.values() if trial.best]
        best = f", best QWK {max(kappas):.3f}" if kappas else ""
        self._progress.update(self._task, completed=done, note=f"{running} running{best}")


def _describe(trial: Trial) -> str:
    if trial.best is None:
        return format_settings(trial.settings)
    return f"QWK {trial.best[METRIC]:.3f}  ({format_settings(trial.settings)})"


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings as in `learning_rate 0.001, loss corn`."""
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _reason(text: str) -> str:
    """Extract the line with the error from the traceback that Tune stores."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b[^:]*: ", line)]
    return (errors[-1] if errors else lines[0]).removeprefix("RuntimeError: ")
