"""What `scalp train` and `scalp grade` count, in Prometheus form: Ray's agent exports it as `ray_scalp_…`.

The driver alone counts, once a shard or twice a second, from what the workers tell it anyway. So what is
counted is work that is kept, nothing is lost with a worker, and no photograph waits for it. Where nobody
asks, or Ray runs no agent, nothing fails. cluster/dashboards shows it; docs/operations.md says what to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ray.util.metrics import Counter, Gauge

# Ray forgets a gauge that was not set for ten seconds.
_AGAIN_S = 5.0


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that the block takes to those of a stage."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started


class _RunMetrics:
    """Counters and gauges of one run, which carry its name; the gauges are there while the block runs.

    Args:
        folder: of the run; the last part of its name is the label `run`.
    """

    def __init__(self, folder: str) -> None:
        self._labels = {"run": folder.rstrip("/").rsplit("/", 1)[-1]}
        self._values: dict[Gauge, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._say_again, daemon=True)

    def _set(self, gauge: Gauge, value: float) -> None:
        self._values[gauge] = value
        gauge.set(value, self._labels)

    def _add(self, counter: Counter, value: float, **labels: str) -> None:
        if value > 0:  # which Ray insists on
            counter.inc(value, self._labels | labels)

    def _say_again(self) -> None:
        while not self._over.wait(_AGAIN_S):
            for gauge, value in self._values.copy().items():
                gauge.set(value, self._labels)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


class TrainMetrics(_RunMetrics):
    """A training, from the notes of its workers.

    Args:
        run: folder of the run.
        epochs: of the whole run.
        batch_size: photographs of a step, over all workers.
    """

    def __init__(self, run: str, epochs: int, batch_size: int) -> None:
        super().__init__(run)
        self._batch_size = batch_size
        self._last: dict[str, Any] = {}
        self._lost = False
        self._restarts = 0
        self._steps = Counter("scalp_train_steps", "steps of the optimiser", ("run",))
        self._photographs = Counter("scalp_train_photographs", "photographs trained on", ("run",))
        self._seconds = Counter("scalp_train_seconds", "seconds of the first worker", ("run", "stage"))
        self._checkpoints = Counter("scalp_train_checkpoints", "checkpoints that are in storage", ("run",))
        self._workers = Gauge("scalp_train_workers", "workers that train", ("run",))
        self._started_again = Gauge("scalp_train_restarts", "starts after workers were lost", ("run",))
        self._epoch = Gauge("scalp_train_epoch", "epochs done, with the part of the running one", ("run",))
        self._loss = Gauge("scalp_train_loss", "mean loss of the epoch so far", ("run",))
        self._rate = Gauge("scalp_train_learning_rate", "of the last step", ("run",))
        self._kappa = Gauge("scalp_train_val_qwk", "validation kappa of the last epoch", ("run",))
        self._set(Gauge("scalp_train_epochs", "epochs of the whole run", ("run",)), epochs)
        self._set(self._workers, 0)
        self._set(self._started_again, 0)

    def note(self, note: Mapping[str, Any]) -> None:
        """Takes a note, as `jobs.train.progress.Follower` describes them."""
        if "step" in note:
            self._step(note)
        elif "epoch_done" in note:
            entry = note["epoch_done"]
            self._add(self._seconds, entry["seconds"] - self._last.get("seconds", 0), stage="validation")
            self._set(self._kappa, entry["val_qwk"])
        elif "workers" in note:
            self._last = {}
            self._restarts += self._lost
            self._lost = False
            self._set(self._started_again, self._restarts)
            self._set(self._workers, note["workers"])
            self._set(self._epoch, note["after"])
        elif "lost" in note:
            self._lost = True
            self._set(self._workers, 0)
        elif "kept" in note:
            self._add(self._checkpoints, 1)

    def _step(self, note: Mapping[str, Any]) -> None:
        """Counts what came since the note before it, of the same epoch."""
        before = self._last if self._last.get("epoch") == note["epoch"] else {}
        steps, seconds, waited = (
            note[name] - before.get(name, 0) for name in ("step", "seconds", "waited_seconds")
        )
        self._add(self._steps, steps)
        self._add(self._photographs, steps * self._batch_size)
        self._add(self._seconds, waited, stage="data")
        self._add(self._seconds, seconds - waited, stage="steps")
        self._set(self._epoch, note["epoch"] - 1 + note["step"] / note["steps"])
        self._set(self._loss, note["loss"])
        self._set(self._rate, note["learning_rate"])
        self._last = dict(note)


class GradeMetrics(_RunMetrics):
    """A bulk run, from its shards as they are committed.

    Args:
        out: folder of the run.
        photographs: in all; None while that is not known, as of tars.
        done: of these, by sessions before.
    """

    def __init__(self, out: str, photographs: int | None, done: int) -> None:
        super().__init__(out)
        self._number = done
        self._photographs = Counter("scalp_grade_photographs", "photographs with a row", ("run",))
        self._failed = Counter("scalp_grade_failed", "of these, failed", ("run", "code"))
        self._shards = Counter("scalp_grade_shards", "shards committed", ("run",))
        self._seconds = Counter("scalp_grade_seconds", "seconds of loaders and models", ("run", "stage"))
        self._done = Gauge("scalp_grade_done", "photographs with a row, of all sessions", ("run",))
        self._set(self._done, done)
        if photographs is not None:
            self._set(Gauge("scalp_grade_size", "photographs in all", ("run",)), photographs)

    def add(self, rows: int, errors: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Counts a shard that was committed.

        Args:
            rows: its photographs.
            errors: how many failed with which code.
            seconds: by stage, of the tasks that had it.
        """
        self._number += rows
        self._set(self._done, self._number)
        self._add(self._photographs, rows)
        self._add(self._shards, 1)
        for code, times in errors.items():
            self._add(self._failed, times, code=code)
        for stage, some in seconds.items():
            self._add(self._seconds, some, stage=stage)
