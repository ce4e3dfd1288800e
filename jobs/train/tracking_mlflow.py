"""Experiment tracking with MLflow, configured by MLflow's own environment variables."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

# MLflow reads these. By default it sends usage data to its maker, and retries an unavailable server for
# minutes; this tracker sends missed epochs later instead. Users may override the last two.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jobs.common.console import console, read_json, write_json
from jobs.train.tracker import Tracker, scalar_points
from scalp_core import storage
from scalp_core.bundles.bundle import CARD_FILE
from scalp_core.errors import UserError

RUN_FILE = "mlflow.json"

_SERVER = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
_SECONDS_BETWEEN_TRIES = 60.0


class MLflow(Tracker):
    """Send the metrics of each epoch to an MLflow run, which a resumed training continues.

    Args:
        run: Run directory, local or `s3://`; its `mlflow.json` has the id of the MLflow run.
        identity: `recipe` and `fold`, logged as parameters; `data_sha256` and `synthetic` (whether the data
            contain images of `scalp synth`), logged as tags.

    Raises:
        UserError: The server is not set, does not answer, or rejects the run.
    """

    def __init__(self, run: str, identity: dict[str, Any]) -> None:
        if not os.environ.get(_SERVER):
            raise UserError(
                f"--tracking mlflow needs a server; set {_SERVER} to MLflow's address, for example http://localhost:5000"
            )
        self._run = run
        self._entries: list[dict[str, Any]] = []
        self._sent: set[int] | None = None  # epochs that MLflow has; None: request them
        self._next_try = 0.0
        self._ended = False
        with _as_user_error():
            self._client = MlflowClient()
            info = self._open().info
            self._id = info.run_id
            self._describe(identity)
        # In the run directory, so that it outlives the driver.
        write_json(storage.join(run, RUN_FILE), {"run_id": self._id})
        server = _without_password(os.environ[_SERVER]).rstrip("/")
        if server.startswith("http"):
            console.print(f"MLflow: {server}/#/experiments/{info.experiment_id}/runs/{self._id}")

    def epoch(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        if time.monotonic() >= self._next_try:
            self._send(self._entries)

    def finish(self, summary: dict[str, Any]) -> None:
        self._ended = True
        # The whole history: MLflow may have missed epochs while it was unavailable or after a killed driver.
        self._send(summary["history"])
        scores = {"best_epoch": summary["best_epoch"], "temperature": summary["temperature"]}
        scores |= {
            name: score for name, score in summary["validation"].items() if isinstance(score, int | float)
        }
        tag = RunTag("scalp.model_version", summary["model_version"])
        with _as_user_error():
            metrics = _metrics((f"bundle/{name}", score, 0) for name, score in scores.items())
            self._client.log_batch(self._id, metrics, tags=[tag])
            self._client.set_terminated(self._id, "FINISHED")
            self._send_files()

    def close(self) -> None:
        if not self._ended:
            with _as_user_error():
                self._client.set_terminated(self._id, "FAILED")

    def _open(self) -> Run:
        """Open the MLflow run of this training, or create one."""
        file = storage.join(self._run, RUN_FILE)
        if known := read_json(file):
            with _as_user_error(f"; restore this MLflow run, or move {file} away to create another"):
                self._client.update_run(known["run_id"], status="RUNNING")
                return self._client.get_run(known["run_id"])
        experiment = mlflow.set_experiment(os.environ.get(_EXPERIMENT) or "scalp")
        return self._client.create_run(experiment.experiment_id, run_name=Path(self._run).name)

    def _describe(self, identity: dict[str, Any]) -> None:
        settings = identity["recipe"] | {"fold": identity["fold"]}
        tags = {
            "version": metadata.version("scalp"),
            "data_sha256": identity["data_sha256"],
            "synthetic": str(identity["synthetic"]).lower(),
            "run": self._run,
        }
        self._client.log_batch(
            self._id,
            params=[Param(name, str(value)) for name, value in settings.items()],
            tags=[RunTag(f"scalp.{name}", value) for name, value in tags.items()],
        )

    def _send(self, entries: list[dict[str, Any]]) -> None:
        """Send the epochs that MLflow lacks, one request per epoch."""
        sent, self._sent = self._sent, None  # after a failure it is unknown what arrived
        self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
        with _as_user_error():
            if sent is None:
                # If MLflow has the last point of an epoch, it has all of them.
                last = scalar_points(entries[-1])[-1][0]
                sent = {metric.step for metric in self._client.get_metric_history(self._id, last)}
            for entry in entries:
                if entry["epoch"] not in sent:
                    self._client.log_batch(self._id, _metrics(scalar_points(entry)))
                    sent.add(entry["epoch"])
        self._sent, self._next_try = sent, 0.0

    def _send_files(self) -> None:
        with tempfile.TemporaryDirectory(prefix="scalp-tracking-") as folder:
            for uri in (storage.join(self._run, "curves.png"), storage.join(self._run, "bundle", CARD_FILE)):
                Path(folder, Path(uri).name).write_bytes(storage.read(uri))
            self._client.log_artifacts(self._id, folder)


def _metrics(scalars: Iterable[tuple[str, float, int]]) -> list[Metric]:
    now = time.time_ns() // 1_000_000
    return [Metric(name, value, now, step) for name, value, step in scalars]


def _without_password(text: str) -> str:
    """Remove credentials from URLs in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextmanager
def _as_user_error(hint: str = "") -> Iterator[None]:
    """Convert MLflow's exceptions in the block to `UserError` with advice."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of MLflow, or of any store that it uses
        message = f"MLflow at {os.environ[_SERVER]}: {_advice(error, hint)}"
        raise UserError(_without_password(message)) from error


def _advice(error: Exception, hint: str) -> str:
    text = str(error)
    if re.search(r"error code 40[13]", text):
        keys = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it rejected the credentials; set {keys}"
    if text.startswith("API request"):
        return f"it does not answer; check {_SERVER}, the server and the network, or use another --tracking"
    return textwrap.shorten(text, 700, placeholder=" …") + hint
