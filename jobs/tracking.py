"""Follows a training run in TensorBoard: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import yaml

from scalp_core import storage
from scalp_core.recipe import Recipe

Tracking = Literal["tensorboard", "none"]

FOLDER = "tensorboard"

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
    """Writes each epoch's figures; a run that goes on adds a file to those before it.

    Args:
        run: the run's directory, local or `s3://`.
        recipe: shown as text beside the curves.
        tracking: `none` writes nothing.
    """

    def __init__(self, run: str, recipe: Recipe, tracking: Tracking) -> None:
        self._uri = storage.join(run, FOLDER)
        self._writer: Any = None
        if tracking == "none":
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        # Written here and copied whole after each epoch: object storage has no files that grow.
        self._folder = tempfile.TemporaryDirectory(prefix="scalp-tracking-")
        self._writer = SummaryWriter(self._folder.name)
        text = yaml.safe_dump(recipe.model_dump(), sort_keys=False)
        self._writer.add_text("recipe", f"    {text.replace(chr(10), chr(10) + '    ')}")

    def epoch(self, entry: dict[str, Any]) -> None:
        """Adds the figures of one epoch, an entry of the history.

        Raises:
            UserError: the run's storage cannot be written.
        """
        if self._writer is None:
            return
        for name, key in _SCALARS.items():
            self._writer.add_scalar(name, entry[key], entry["epoch"])
        losses, steps = entry["step_losses"], entry["steps"]
        for number, loss in enumerate(losses, 1):
            step = (entry["epoch"] - 1) * steps + round(number * steps / len(losses))
            self._writer.add_scalar("loss/step", loss, step)
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            storage.write(storage.join(self._uri, file.name), file.read_bytes())

    def close(self) -> None:
        """Removes what was only for the way."""
        if self._writer is not None:
            self._writer.close()
            self._folder.cleanup()
