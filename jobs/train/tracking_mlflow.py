"""Follows a training run in MLflow: its own variables name the server, the keys and the experiment."""

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

# MLflow reads these: it reports its use to its maker unless told not to, and asks a server that does not
# answer again for minutes. Here what a server missed is sent later. Who sets the last two is heard.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from jobs.common.console import console, read_json, write_json
from jobs.train.tracker import Tracker, points
from scalp_core import storage
from scalp_core.bundles.bundle import CARD_FILE
from scalp_core.errors import UserError

RUN_FILE = "mlflow.json"

_SERVER = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
_SECONDS_BETWEEN_TRIES = 60.0


class MLflow(Tracker):
    """Sends each epoch's figures to one MLflow run; the same RUN again goes on with it.

    Args:
        run: the run's directory, local or `s3://`; `mlflow.json` in it holds the id of the MLflow run.
        identity: `recipe` and `fold`, logged as parameters; `data_sha256` and `synthetic` (the data hold
            images of `scalp synth`), logged as tags.

    Raises:
        UserError: no server is named, or it does not answer, or it does not take the run.
    """

    def __init__(self, run: str, identity: dict[str, Any]) -> None:
        if not os.environ.get(_SERVER):
            raise UserError(
                f"--tracking mlflow: set {_SERVER} to MLflow's address, for example http://localhost:5000"
            )
        self._run = run
        self._entries: list[dict[str, Any]] = []
        self._there: set[int] | None = None  # epochs that MLflow has; None when that must be asked
        self._next_try = 0.0
        self._ended = False
        with _explained():
            self._client = MlflowClient()
            begun = self._open().info
            self._id = begun.run_id
            self._describe(identity)
        # Beside the other files of this run, so that nothing of it is lost when the driver is.
        write_json(storage.join(run, RUN_FILE), {"run_id": self._id})
        server = _without_password(os.environ[_SERVER]).rstrip("/")
        if server.startswith("http"):
            console.print(f"MLflow: {server}/#/experiments/{begun.experiment_id}/runs/{self._id}")

    def epoch(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        if time.monotonic() >= self._next_try:
            self._send(self._entries)

    def finish(self, summary: dict[str, Any]) -> None:
        self._ended = True
        # The whole history: epochs that MLflow missed while it was away, or that a killed driver never sent.
        self._send(summary["history"])
        scores = {"best_epoch": summary["best_epoch"], "temperature": summary["temperature"]}
        scores |= {
            name: score for name, score in summary["validation"].items() if isinstance(score, int | float)
        }
        tag = RunTag("scalp.model_version", summary["model_version"])
        with _explained():
            metrics = _metrics((f"bundle/{name}", score, 0) for name, score in scores.items())
            self._client.log_batch(self._id, metrics, tags=[tag])
            self._client.set_terminated(self._id, "FINISHED")
            self._send_files()

    def close(self) -> None:
        if not self._ended:
            with _explained():
                self._client.set_terminated(self._id, "FAILED")

    def _open(self) -> Run:
        """A new MLflow run, or the one that this run began."""
        file = storage.join(self._run, RUN_FILE)
        if known := read_json(file):
            with _explained(f"; restore this MLflow run, or remove {file} to begin another"):
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
        """Sends the epochs that MLflow does not have, each in one request."""
        there, self._there = self._there, None  # an answer that got lost leaves open what arrived
        self._next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
        with _explained():
            if there is None:
                # The last point of an epoch: where it is, all are.
                last = points(entries[-1])[-1][0]
                there = {metric.step for metric in self._client.get_metric_history(self._id, last)}
            for entry in entries:
                if entry["epoch"] not in there:
                    self._client.log_batch(self._id, _metrics(points(entry)))
                    there.add(entry["epoch"])
        self._there, self._next_try = there, 0.0

    def _send_files(self) -> None:
        with tempfile.TemporaryDirectory(prefix="scalp-tracking-") as folder:
            for uri in (storage.join(self._run, "curves.png"), storage.join(self._run, "bundle", CARD_FILE)):
                Path(folder, Path(uri).name).write_bytes(storage.read(uri))
            self._client.log_artifacts(self._id, folder)


def _metrics(figures: Iterable[tuple[str, float, int]]) -> list[Metric]:
    now = time.time_ns() // 1_000_000
    return [Metric(name, value, now, step) for name, value, step in figures]


def _without_password(text: str) -> str:
    """An address may have one before its host."""
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextmanager
def _explained(way_out: str = "") -> Iterator[None]:
    """Turns what MLflow raises inside the block into one line with the way out."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow's own kind, or whatever the store behind it raises
        message = f"MLflow at {os.environ[_SERVER]}: {_advice(error, way_out)}"
        raise UserError(_without_password(message)) from error


def _advice(error: Exception, way_out: str) -> str:
    text = str(error)
    if re.search(r"error code 40[13]", text):
        keys = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it refused the key; set {keys}"
    if text.startswith("API request"):
        return f"it does not answer; check {_SERVER}, the server and the network, or take another --tracking"
    return textwrap.shorten(text, 700, placeholder=" …") + way_out
