"""Choose what runs the steps of a command: this process, or Ray."""

from __future__ import annotations

from cluster.resources import is_joined
from jobs.common import supervise
from jobs.common.executor import Executor


def make_executor(local: bool) -> Executor:
    """Executor of a command: Ray, or with `--local` this process with all its cores and its GPU."""
    if local:
        return _make_local_executor()
    from jobs.common.ray_executor import RayExecutor  # slow to import

    return RayExecutor()


def make_grade_executor(local: bool | None) -> Executor:
    """Executor of `scalp grade`; None: Ray if it is joined or there is a GPU, else this process.

    A GPU needs several processes for its models, which Ray runs.
    """
    if local is None:
        from scalp_core.inference.predictor import resolve_device

        local = not is_joined() and resolve_device("auto") == "cpu"
    return make_executor(local)


def _make_local_executor() -> Executor:
    """Local executor that resumes after a crash of its process, such as of a decoder."""
    process = supervise.fork()
    from joblib import cpu_count

    from jobs.common.local_executor import LocalExecutor
    from scalp_core.inference.predictor import resolve_device

    gpus = int(resolve_device("auto") == "cuda")
    return LocalExecutor(cpu_count(), gpus, process.restarts, process.count_progress)
