"""Choose what runs the steps of a command: this process, or Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import supervise
from jobs.common.executor import Executor, needs_ray

if TYPE_CHECKING:
    from scalp_core.inference.predictor import Device

# What a user can do if a command that runs models ends for its memory.
SMALLER_BATCH = "run the same command again with a smaller --batch-size"


def runs_here(local: bool | None, device: Device = "auto", needs_cluster: bool = False) -> bool:
    """Whether a command runs in its process instead of in Ray.

    Args:
        local: `--local` or `--cluster`; None: as `needs_ray` and `needs_cluster` decide.
        device: Device of the models.
        needs_cluster: Whether an option of the command needs several processes.
    """
    return local if local is not None else not (needs_cluster or needs_ray(device))


def make_executor(local: bool, less_memory: str) -> Executor:
    """Executor of a command: Ray, or with `local` this process with all its cores and its GPU.

    Args:
        local: Whether to use this process.
        less_memory: As in `supervise.fork`.
    """
    if local:
        return _make_local_executor(less_memory)
    from jobs.common.ray_executor import RayExecutor  # slow to import

    return RayExecutor()


def _make_local_executor(less_memory: str) -> Executor:
    """Local executor that resumes after a crash of its process, such as of a decoder."""
    process = supervise.fork(less_memory)
    from joblib import cpu_count

    from jobs.common.local_executor import LocalExecutor
    from scalp_core.inference.predictor import resolve_device

    gpus = int(resolve_device("auto") == "cuda")
    return LocalExecutor(cpu_count(), gpus, process.restarts, process.count_progress)
