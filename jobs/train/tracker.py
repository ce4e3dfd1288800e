"""The interface of experiment trackers, and the scalars that they receive."""

from __future__ import annotations

from typing import Any

_SCALARS = {
    "loss/training": "train_loss",
    "loss/validation": "val_loss",
    "top1/training": "train_top1",
    "top1/validation": "val_top1",
    "qwk/validation": "val_qwk",
    "learning_rate": "learning_rate",
    "photographs_per_second": "photographs_per_second",
    "data_wait_share": "data_wait_share",
    "workers": "workers",
}


class Tracker:
    """A tracker of a run; this base class writes nothing. Subclasses raise `UserError` on failure."""

    def epoch(self, entry: dict[str, Any]) -> None:
        """Record the metrics of one epoch, an entry of the history."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the summary of a finished run."""

    def close(self) -> None:
        """Release resources, after `finish` or without it."""


def scalar_points(entry: dict[str, Any]) -> list[tuple[str, float, int]]:
    """List the name, value and step of an epoch's scalars: the loss per step, then the metrics."""
    losses, steps = entry["step_losses"], entry["steps"]
    first = (entry["epoch"] - 1) * steps
    by_step = [
        ("loss/step", loss, first + round(number * steps / len(losses)))
        for number, loss in enumerate(losses, 1)
    ]
    return by_step + [(name, entry[key], entry["epoch"]) for name, key in _SCALARS.items()]
