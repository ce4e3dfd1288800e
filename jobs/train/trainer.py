"""Ray Train's trainer for `scalp train` and each trial of `scalp tune`."""

from __future__ import annotations

from typing import Any

from ray.train import Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.ray_internals import train_helpers
from cluster.resources import is_joined
from jobs.train.worker import train_worker
from scalp_core import storage

# Makes glibc keep freed memory, in huge pages. Mapping each large activation again in each step takes up to a
# fifth of the training time on CPUs, and pages of 4 KiB another tenth where the kernel's default is madvise.
# One arena, because workers train in a thread, for which glibc would make another.
_WORKERS = {
    "env_vars": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the maximum of glibc
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }
}


class _Trainer(TorchTrainer):
    """A trainer without two helper processes of Ray, which would take CPU time from workers on a laptop.

    One holds datasets that are passed to a trainer; scalp's workers make theirs. The other cleans up after a
    killed driver, which only a cluster that outlives the driver needs.
    """

    def _create_default_callbacks(self) -> list[Any]:
        datasets, cleaner = train_helpers()
        idle = (datasets,) if is_joined() else (datasets, cleaner)
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, idle)]

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
            name="checkpoints",  # folder in RUN; the same name resumes
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env=_WORKERS,
            **options,
        ),
    )
