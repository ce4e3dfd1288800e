"""Ray Train's trainer, of `scalp train` and of each trial of `scalp tune`; loads no model code of its own."""

from __future__ import annotations

from typing import Any

from ray.train import Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.local import is_joined
from cluster.ray_internals import train_helpers
from scalp_core import storage

# Workers train in a thread, which glibc would give an arena of its own; in the main one, what
# `worker._keep_freed_memory` asks for holds.
_WORKERS = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}


def _train(config: dict[str, Any]) -> str | None:
    # Not imported above: the process of a trial starts workers and needs neither timm nor metrics.
    from jobs.train.worker import train_worker

    return train_worker(config)


class _Trainer(TorchTrainer):
    """Without processes that have nothing to do here; on a laptop each takes from the workers' few cores.

    One holds datasets that a trainer is given, and ours make their own. The other clears up after a driver
    that was killed, on a cluster that outlives it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        datasets, cleaner = train_helpers()
        idle = (datasets,) if is_joined() else (datasets, cleaner)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]


def divergence_message(result: Result) -> str | None:
    """The line for a user if the loss was not finite, which ended the training; None if it went well."""
    if result.return_value is None:
        return None
    return (
        f"the loss is not finite at {result.return_value}; use a smaller --set learning_rate=… or --set "
        "gradient_clip=…, and check that --weights fit"
    )


def make_trainer(config: dict[str, Any], run: str, scaling: ScalingConfig, **options: Any) -> TorchTrainer:
    """The trainer, which goes on from the checkpoints that `run` holds.

    Args:
        config: for `train_worker`.
        run: directory for checkpoints, local or `s3://`.
        scaling: the workers.
        options: what else Ray's RunConfig takes.
    """
    filesystem, path = storage.filesystem(run)
    return _Trainer(
        _train,
        train_loop_config=config,
        scaling_config=scaling,
        run_config=RunConfig(
            name="checkpoints",  # in RUN; the same name again restores
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env=_WORKERS,
            **options,
        ),
    )
