"""Experiment tracking of training runs: TensorBoard (`tensorboard --logdir RUN/tensorboard`) or MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from jobs.common.console import console
from jobs.train.tracker import Tracker, scalar_points
from scalp_core import storage
from scalp_core.errors import UserError

Tracking = Literal["tensorboard", "mlflow", "none"]

FOLDER = "tensorboard"


@contextmanager
def open_tracker(tracking: Tracking, run: str, identity: dict[str, Any]) -> Iterator[Tracker]:
    """Open the tracker of a run, and close it at the end of the block.

    Args:
        tracking: Kind of tracker.
        run: Run directory, local or `s3://`.
        identity: `recipe`, `data_sha256` and `fold`, as in `run/run.json`, and `synthetic`.

    Raises:
        UserError: MLflow is not installed, its server is not set, or the server does not answer.
    """
    tracker = Tracker()
    if tracking == "tensorboard":
        tracker = TensorBoard(run, identity["recipe"])
    elif tracking == "mlflow":
        tracker = _mlflow(run, identity)
    try:
        yield tracker
    finally:
        with tolerate_errors():
            tracker.close()


@contextmanager
def tolerate_errors() -> Iterator[None]:
    """Print errors of a tracker instead of raising them: they must not stop a training."""
    try:
        yield
    except UserError as error:
        console.print(f"not tracked: {error}")


def _mlflow(run: str, identity: dict[str, Any]) -> Tracker:
    try:
        from jobs.train.tracking_mlflow import MLflow
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        raise UserError("--tracking mlflow: MLflow is missing; pip install mlflow-skinny") from None
    return MLflow(run, identity)


class TensorBoard(Tracker):
    """Write the metrics of each epoch for TensorBoard; a resumed run adds a file.

    Args:
        run: Run directory, local or `s3://`.
        recipe: Recipe, shown as text.
    """

    def __init__(self, run: str, recipe: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._uri = storage.join(run, FOLDER)
        # Written to a local folder and copied after each epoch: object storage cannot append to files.
        self._folder = tempfile.TemporaryDirectory(prefix="scalp-tracking-")
        self._writer: Any = SummaryWriter(self._folder.name)
        text = yaml.safe_dump(recipe, sort_keys=False)
        self._writer.add_text("recipe", f"    {text.replace(chr(10), chr(10) + '    ')}")

    def epoch(self, entry: dict[str, Any]) -> None:
        for name, value, step in scalar_points(entry):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        for file in Path(self._folder.name).iterdir():
            storage.write(storage.join(self._uri, file.name), file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        self._folder.cleanup()
