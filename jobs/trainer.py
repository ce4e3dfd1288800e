"""Ray Train's trainer, of `scalp train` and of each trial of `scalp tune`; loads no model code of its own."""

from __future__ import annotations

from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from scalp_core import storage


def _train(config: dict[str, Any]) -> None:
    # Not imported above: the process of a trial starts workers and needs neither timm nor metrics.
    from jobs.train_loop import train_worker

    train_worker(config)


def trainer(config: dict[str, Any], run: str, scaling: ScalingConfig, **options: Any) -> TorchTrainer:
    """The trainer, which goes on from the checkpoints that `run` holds.

    Args:
        config: for `train_worker`.
        run: directory for checkpoints, local or `s3://`.
        scaling: the workers.
        options: what else Ray's RunConfig takes.
    """
    filesystem, path = storage.filesystem(run)
    return TorchTrainer(
        _train,
        train_loop_config=config,
        scaling_config=scaling,
        run_config=RunConfig(
            name="checkpoints",  # in RUN; the same name again restores
            storage_path=path,
            storage_filesystem=filesystem,
            **options,
        ),
    )
