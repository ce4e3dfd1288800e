"""Progress of `scalp train` on the console: progress bar, one line per epoch, lost workers, waiting."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from queue import Queue as LocalQueue
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.common.console import console, progress_bar
from jobs.common.prometheus import TrainMetrics
from jobs.train.scaling import CPUS_FOR_DATA
from jobs.train.tracking import Tracker, tolerate_errors
from scalp_core.models.recipe import Recipe

_WAITING_MESSAGE_AFTER_S = 60.0
_POLL_S = 5.0


class Notes(Protocol):
    """The reading end of the queue of notes."""

    def get(self, *, timeout: float) -> dict[str, Any]: ...

    def empty(self) -> bool: ...


class ControllerCallback(UserCallback):
    """Callback in Ray's controller that notes lost workers and stored checkpoints."""

    def __init__(self, notes: Queue) -> None:
        self._notes = notes

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        gc.freeze()  # as in `train_worker`
        if checkpoint:
            self._notes.put_nowait({"kept": metrics[0]["epoch"]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        self._notes.put_nowait({"lost": len(worker_exceptions)})


class Follower:
    """Print the workers' notes, and a message if no worker can start.

    Args:
        notes: Queue of notes. Keys of a note: `workers` that start, the epoch `after` which they resume, and
            their placement `group`; `epoch, step, steps, loss, learning_rate`, with the epoch's `seconds` and
            `waited_seconds` so far; `epoch_done`, an entry of the history; `kept`, an epoch with a stored
            checkpoint; `lost`, the number of lost workers.
        epochs: Epochs of the whole run.
        tracker: Tracker that records each epoch.
        fewest: Minimum number of workers; 0 if the training runs in this process, which waits for none.
        metrics: Prometheus metrics that count the notes.
        label: Beginning of each line.
        as_lines: Print lines instead of a progress bar, because other trainings print at the same time.
    """

    def __init__(
        self,
        notes: Notes,
        epochs: int,
        tracker: Tracker,
        fewest: int,
        metrics: TrainMetrics,
        label: str = "",
        as_lines: bool = False,
    ) -> None:
        self._notes = notes
        self._epochs = epochs
        self._tracker = tracker
        self._fewest = fewest
        self._metrics = metrics
        self._label = label
        self._as_lines = as_lines
        self._training = False
        self._since = time.monotonic()
        self.stop = threading.Event()
        self.group: PlacementGroup | None = None

    def run(self) -> None:
        """Print notes until `stop` is set and the queue is empty."""
        bar = progress_bar(f"{self._label}training, steps", None, as_lines=self._as_lines)
        with self._metrics, bar as (progress, task):
            while not (self.stop.is_set() and self._notes.empty()):
                try:
                    note = self._notes.get(timeout=_POLL_S)
                except Empty:
                    self._print_if_waiting()
                    continue
                if not note:  # the end mark of `follow_progress`
                    continue
                self._since = time.monotonic()
                self._metrics.note(note)
                if "step" in note:
                    done = (note["epoch"] - 1) * note["steps"] + note["step"]
                    total = self._epochs * note["steps"]
                    progress.update(task, total=total, completed=done, note=f"loss {note['loss']:.3f}")
                else:
                    self._print_note(note)

    def _print(self, line: str) -> None:
        console.print(f"{self._label}{line}")

    def _print_note(self, note: dict[str, Any]) -> None:
        if "lost" in note:
            self._training = False
            self._print(f"workers failed: {note['lost']}")
        elif "workers" in note:
            self._training = True
            self.group = note.get("group")
            where = f"resuming after epoch {note['after']}" if note["after"] else "starting"
            self._print(f"{where}, workers: {note['workers']}")
        elif "epoch_done" in note:
            self._print(_epoch_line(note["epoch_done"], self._epochs))
            with tolerate_errors():
                self._tracker.epoch(note["epoch_done"])

    def _print_if_waiting(self) -> None:
        """Print a message while Ray waits for resources, because Ray itself waits silently and forever."""
        if (
            not self._fewest
            or self.stop.is_set()
            or time.monotonic() - self._since < _WAITING_MESSAGE_AFTER_S
        ):
            return
        have = ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
        short = cpus < self._fewest + CPUS_FOR_DATA
        if self._training and not short and not _pending():
            return  # busy with slow steps or a validation
        self._since = time.monotonic()
        self._print(
            f"waiting for resources (workers: {self._fewest}, CPUs for their data: {CPUS_FOR_DATA}); Ray has "
            f"{cpus} CPUs and {gpus} GPUs, and other work may use some of them"
        )


@contextmanager
def follow_progress(
    run: str,
    recipe: Recipe,
    tracker: Tracker,
    fewest: int,
    label: str = "",
    as_lines: bool = False,
    here: bool = False,
) -> Iterator[Any]:
    """Open a queue for the workers' notes, and print them with a `Follower` during the block.

    The queue is one of Ray; with `here` one of this process, in which the training runs.
    """
    notes = LocalQueue() if here else _ray_queue()
    metrics = TrainMetrics(run, recipe.epochs, recipe.batch_size)
    follower = Follower(notes, recipe.epochs, tracker, 0 if here else fewest, metrics, label, as_lines)
    thread = threading.Thread(target=follower.run, daemon=True)
    thread.start()
    controller_died = False
    try:
        yield notes
    except RayActorError:
        controller_died = True
        raise
    finally:
        follower.stop.set()
        with suppress(RayError):  # the error that ended the block may have ended the queue too
            notes.put_nowait({})
        thread.join(timeout=30)  # longer than the timeouts of trackers
        if isinstance(notes, Queue):
            notes.shutdown()
        if controller_died and follower.group:
            # The controller did not, and Ray would keep the workers' CPUs until this process ends.
            remove_placement_group(follower.group)


def _ray_queue() -> Queue:
    # On the driver's node: if another node with the queue is lost, all workers fail.
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": on_this_node})


def _pending() -> bool:
    """Whether a placement group waits for resources, as a new group of workers does."""
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())


def _epoch_line(entry: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {entry['epoch']}/{epochs}  "
        f"loss {entry['train_loss']:.3f}  top-1 {entry['train_top1']:.3f}  |  validation "
        f"loss {entry['val_loss']:.3f}  top-1 {entry['val_top1']:.3f}  QWK {entry['val_qwk']:.3f}  "
        f"({entry['seconds']:.0f} s, {entry['data_wait_share']:.0%} waiting for data)"
    )
