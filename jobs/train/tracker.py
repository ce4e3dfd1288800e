"""The interface of trackers that follow a training run, and the scalars that they take."""

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
    """Follows a run; this one writes nothing. What the others raise is `UserError`."""

    def epoch(self, entry: dict[str, Any]) -> None:
        """Takes the figures of one epoch, an entry of the history."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Takes the summary of a run that reached its end."""

    def close(self) -> None:
        """Lets go of what is held, after `finish` or instead of it."""


def points(entry: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Name, value and step of all that one epoch's entry says: loss by step, then the figures by epoch."""
    losses, steps = entry["step_losses"], entry["steps"]
    first = (entry["epoch"] - 1) * steps
    by_step = [
        ("loss/step", loss, first + round(number * steps / len(losses)))
        for number, loss in enumerate(losses, 1)
    ]
    return by_step + [(name, entry[key], entry["epoch"]) for name, key in _SCALARS.items()]
