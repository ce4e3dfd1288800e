"""What runs `train_worker`: Ray Train's workers, or this process."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from queue import Queue
from typing import Any

from ray.train import CheckpointConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.local import quiet_loggers
from cluster.ray_internals import train_context, train_helpers
from jobs.train.worker import train_worker
from scalp_core import storage

# Makes glibc keep freed memory, in huge pages. Mapping each large activation again in each step takes up to a
# fifth of the training time on CPUs, and pages of 4 KiB another tenth where the kernel's default is madvise.
# One arena, because workers train in a thread, for which glibc would make another.
_LARGEST_CHUNK = 32 * 2**20  # the maximum of glibc
_KEPT = 2**31 - 1
_WORKERS = {
    "env_vars": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(_LARGEST_CHUNK),
        "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
    }
}
_FOLDER = "checkpoints"  # in RUN; the same name resumes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _Trainer(TorchTrainer):
    """A trainer without two helper processes of Ray, which would take CPU time from workers on a laptop.

    One holds datasets that are passed to a trainer; scalp's workers make theirs. The other gives back the
    workers' CPUs and GPUs if the controller dies, which `follow_progress` does.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, train_helpers())]

    def _register_sigint_handler(self, *_: Any) -> None:
        """Leave Ctrl-C to the command: Ray's handler stays after the training, and exits with code 1."""


def divergence_message(result: Result) -> str | None:
    """Return the message for a training that ended with a loss that is not finite; otherwise None."""
    if result.return_value is None:
        return None
    return (
        f"the loss is not finite at {result.return_value}; use a smaller --set learning_rate=… or --set "
        "gradient_clip=…, and check that --weights fit"
    )


def make_trainer(config: dict[str, Any], run: str, scaling: ScalingConfig, **options: Any) -> TorchTrainer:
    """Make a trainer that resumes from the checkpoints in `run`.

    Args:
        config: Configuration of `train_worker`.
        run: Directory for checkpoints, local or `s3://`.
        scaling: Number and resources of the workers.
        options: Further arguments of Ray's RunConfig.
    """
    filesystem, path = storage.filesystem(run)
    return _Trainer(
        train_worker,
        train_loop_config=config,
        scaling_config=scaling,
        run_config=RunConfig(
            name=_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env=_WORKERS,
            **options,
        ),
    )


def train_here(
    config: dict[str, Any],
    run: str,
    checkpoints: CheckpointConfig,
    notes: Queue[Any],
    progress: Callable[[], None],
) -> Result:
    """Train in this process. A training on Ray can resume from the checkpoints, and this one from its.

    Args:
        config: Configuration of `train_worker`.
        run: Directory for checkpoints, local or `s3://`.
        checkpoints: Checkpoints to keep.
        notes: Queue of the driver.
        progress: Called after each checkpoint.
    """
    filesystem, path = storage.filesystem(run)
    quiet_loggers()
    keep_freed_memory()

    def after_checkpoint(metrics: dict[str, Any]) -> None:
        progress()
        notes.put_nowait({"kept": metrics["epoch"]})

    with train_context(path, filesystem, _FOLDER, checkpoints, after_checkpoint):
        divergence = train_worker(config)
    result = Result.from_path(f"{path}/{_FOLDER}", filesystem)
    result.return_value = divergence
    return result


def keep_freed_memory() -> None:
    """Set in this process what `_WORKERS` sets in others, except for huge pages; needs glibc."""
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        set_option(_M_MMAP_THRESHOLD, _LARGEST_CHUNK)
        set_option(_M_TRIM_THRESHOLD, _KEPT)
