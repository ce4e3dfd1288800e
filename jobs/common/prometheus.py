"""Prometheus metrics of `scalp train` and `scalp grade`, which Ray's agent exports as `ray_scalp_…`.

The driver alone counts, per shard or twice per second, from the messages of the workers. So the counts
include committed work only, survive a lost worker, and delay no image. Without Ray's agent they are dropped.
cluster/dashboards plots them; docs/metrics.md lists them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

# Ray drops a gauge that was not set for ten seconds.
_REPEAT_INTERVAL_S = 5.0


class _RunMetrics:
    """Counters and gauges of one run, labeled with its name; gauges are exported while the block runs.

    Args:
        folder: Output or run directory; its last path component is the label `run`.
    """

    def __init__(self, folder: str) -> None:
        self._labels = {"run": folder.rstrip("/").rsplit("/", 1)[-1]}
        self._values: dict[Gauge, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat_gauges, daemon=True)

    def _set(self, gauge: Gauge, value: float) -> None:
        self._values[gauge] = value
        gauge.set(value, self._labels)

    def _add(self, counter: Counter, value: float, **labels: str) -> None:
        if value > 0:  # Ray refuses an increment of 0
            counter.inc(value, self._labels | labels)

    def _repeat_gauges(self) -> None:
        while not self._over.wait(_REPEAT_INTERVAL_S):
            for gauge, value in self._values.copy().items():
                gauge.set(value, self._labels)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class TrainMetrics(_RunMetrics):
    """Metrics of a training run, from the notes of its workers.

    Args:
        run: Run directory.
        epochs: Epochs of the whole run.
        batch_size: Images per step, summed over the workers.
    """

    def __init__(self, run: str, epochs: int, batch_size: int) -> None:
        super().__init__(run)
        self._batch_size = batch_size
        self._last: dict[str, Any] = {}
        self._lost = False
        self._restarts = 0
        self._steps = Counter("scalp_train_steps", "optimizer steps; repeated work counts again", ("run",))
        self._photographs = Counter("scalp_train_photographs", "images in these steps", ("run",))
        self._seconds = Counter(
            "scalp_train_seconds",
            "seconds of the first worker. data: wait for images; steps; validation: to the end of the epoch",
            ("run", "stage"),
        )
        self._checkpoints = Counter("scalp_train_checkpoints", "checkpoints stored", ("run",))
        self._workers = Gauge("scalp_train_workers", "workers that train; 0 while none runs", ("run",))
        self._started_again = Gauge(
            "scalp_train_restarts", "starts after a loss of workers, since the command began", ("run",)
        )
        self._epoch = Gauge(
            "scalp_train_epoch", "epochs done, with the fraction of the current one", ("run",)
        )
        self._loss = Gauge("scalp_train_loss", "mean loss of the epoch so far", ("run",))
        self._rate = Gauge("scalp_train_learning_rate", "learning rate of the last step", ("run",))
        self._kappa = Gauge("scalp_train_val_qwk", "validation kappa of the last epoch", ("run",))
        self._set(Gauge("scalp_train_epochs", "epochs of the whole run", ("run",)), epochs)
        self._set(self._workers, 0)
        self._set(self._started_again, 0)

    def note(self, note: Mapping[str, Any]) -> None:
        """Update the metrics from a note of `jobs.train.progress.Follower`."""
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
        """Add the difference to the previous note of the same epoch."""
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
    """Metrics of a bulk run, from its shards as they are committed.

    Args:
        out: Output directory.
        images: Images in total; None if unknown, as in tars.
        done: Images graded by earlier sessions.
    """

    def __init__(self, out: str, images: int | None, done: int) -> None:
        super().__init__(out)
        self._number = done
        self._photographs = Counter(
            "scalp_grade_photographs", "images with a row, committed by this Ray", ("run",)
        )
        self._failed = Counter("scalp_grade_failed", "failed images among them", ("run", "code"))
        self._shards = Counter(
            "scalp_grade_shards", "shards committed by this Ray; a shard is committed as a whole", ("run",)
        )
        self._seconds = Counter(
            "scalp_grade_seconds",
            "seconds of the loading tasks (fetch: wait for storage; decode) and of the models (wait: for a "
            "decoded shard; model; commit, next to them)",
            ("run", "stage"),
        )
        self._done = Gauge("scalp_grade_done", "images with a row, also of earlier sessions", ("run",))
        self._set(self._done, done)
        if images is not None:
            self._set(
                Gauge("scalp_grade_size", "images in total; absent if a source is a tar", ("run",)), images
            )

    def add(self, rows: int, errors: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Count a committed shard: its images, failed ones by error code, and seconds by stage."""
        self._number += rows
        self._set(self._done, self._number)
        self._add(self._photographs, rows)
        self._add(self._shards, 1)
        for code, count in errors.items():
            self._add(self._failed, count, code=code)
        for stage, spent in seconds.items():
            self._add(self._seconds, spent, stage=stage)
