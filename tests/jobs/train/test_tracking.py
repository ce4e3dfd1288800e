"""MLflow gets all epochs of a training, also after outages and restarts."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.train import tracking_mlflow
from jobs.train.tracking import open_tracker, tolerate_errors
from scalp_core.errors import UserError
from tests.support.mlflow_api import mlflow_server
from tests.support.ports import free_port

IDENTITY = {
    "recipe": {"epochs": 3, "learning_rate": 0.001, "weights": "none"},
    "data_sha256": "ab12",
    "synthetic": True,
    "fold": None,
}


def entry(epoch):
    return {
        "epoch": epoch, "workers": 2, "steps": 8, "step_losses": [epoch + 0.5, epoch + 0.25],
        "train_loss": 1 / epoch, "train_top1": 0.5, "learning_rate": 1e-3,
        "val_loss": 2 / epoch, "val_top1": 0.25, "val_qwk": 0.1 * epoch, "val_n": 4,
        "photographs_per_second": 9.5, "data_wait_share": 0.0, "seconds": 1.0,
    }  # fmt: skip


def summary(epochs):
    return {
        "history": [entry(epoch) for epoch in range(1, epochs + 1)],
        "validation": {"n": 40, "qwk": 0.75, "recall": [0.5, 0.5], "slices": {}},
        "best_epoch": 2,
        "temperature": 1.25,
        "model_version": "run-1234",
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "bundle").mkdir(parents=True)
    (folder / "curves.png").write_bytes(b"a picture")
    (folder / "bundle" / "MODEL_CARD.md").write_text("a card")
    return str(folder)


@pytest.fixture
def port(monkeypatch):
    """The port of MLFLOW_TRACKING_URI, on which no server listens yet."""
    port = free_port()
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and "HTTP" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    return port


@pytest.fixture(params=["server", "files"])
def mlflow(request, port, tmp_path, monkeypatch):
    """A client of an empty MLflow, over HTTP or in a folder."""
    if request.param == "files":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
        yield MlflowClient()
        return
    with mlflow_server(tmp_path / "server", port) as client:
        yield client


def runs(store, experiment="scalp"):
    found = store.get_experiment_by_name(experiment)
    return store.search_runs([found.experiment_id]) if found else []


def series(store, run_id, name):
    return [(metric.step, metric.value) for metric in store.get_metric_history(run_id, name)]


def test_mlflow_has_recipe_metrics_and_files(mlflow, run, tmp_path):
    with open_tracker("mlflow", run, IDENTITY) as tracker:
        tracker.epoch(entry(1))
        tracker.epoch(entry(2))
        [running] = runs(mlflow)
        assert running.info.status == "RUNNING"
        tracker.finish(summary(2))
    [logged] = runs(mlflow)
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "run")
    assert logged.data.params == {"epochs": "3", "learning_rate": "0.001", "weights": "none", "fold": "None"}
    names = ("data_sha256", "synthetic", "run", "model_version")
    tags = {name: logged.data.tags[f"scalp.{name}"] for name in names}
    assert tags == {"data_sha256": "ab12", "synthetic": "true", "run": run, "model_version": "run-1234"}
    number = logged.info.run_id
    assert series(mlflow, number, "loss/validation") == [(1, 2.0), (2, 1.0)]
    assert series(mlflow, number, "qwk/validation") == [(1, 0.1), (2, 0.2)]
    assert series(mlflow, number, "loss/step") == [(4, 1.5), (8, 1.25), (12, 2.5), (16, 2.25)]
    assert logged.data.metrics["bundle/qwk"] == 0.75
    assert logged.data.metrics["bundle/best_epoch"] == 2
    files = {file.name: file.read_bytes() for file in tmp_path.glob("**/artifacts/*")}
    assert files == {"curves.png": b"a picture", "MODEL_CARD.md": b"a card"}


def test_resumed_run_is_one_mlflow_run_with_each_epoch_once(mlflow, run):
    with pytest.raises(KeyboardInterrupt), open_tracker("mlflow", run, IDENTITY) as tracker:
        tracker.epoch(entry(1))
        tracker.epoch(entry(2))
        raise KeyboardInterrupt
    [stopped] = runs(mlflow)
    assert stopped.info.status == "FAILED"
    with open_tracker("mlflow", run, IDENTITY) as tracker:
        [again] = runs(mlflow)
        assert (again.info.run_id, again.info.status) == (stopped.info.run_id, "RUNNING")
        tracker.epoch(entry(2))  # its checkpoint was lost, so it was done again
        tracker.epoch(entry(4))  # and the note of another epoch was
        tracker.finish(summary(4))
    [ended] = runs(mlflow)
    assert ended.info.status == "FINISHED"
    for name in ("loss/validation", "workers"):
        assert sorted(step for step, _ in series(mlflow, ended.info.run_id, name)) == [1, 2, 3, 4]
    assert len(series(mlflow, ended.info.run_id, "loss/step")) == 8


def test_runs_are_separate_in_the_named_experiment(mlflow, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "clinic")
    for folder in (run, str(tmp_path / "other")):
        with open_tracker("mlflow", folder, IDENTITY):
            pass
    assert {each.info.run_name for each in runs(mlflow, "clinic")} == {"run", "other"}
    assert not runs(mlflow)


def test_server_receives_missed_epochs_after_an_outage(run, port, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking_mlflow, "_SECONDS_BETWEEN_TRIES", 0.0)
    folder = tmp_path / "server"
    with mlflow_server(folder, port):
        tracker = tracking_mlflow.MLflow(run, IDENTITY)
        tracker.epoch(entry(1))
    with tolerate_errors():
        tracker.epoch(entry(2))
    assert "not tracked: MLflow at" in capsys.readouterr().out
    with mlflow_server(folder, port) as mlflow:
        tracker.epoch(entry(3))
        [logged] = runs(mlflow)
        assert series(mlflow, logged.info.run_id, "loss/training") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_training_ends_normally_during_an_outage(run, port, tmp_path, capsys):
    with mlflow_server(tmp_path / "server", port):
        tracker = tracking_mlflow.MLflow(run, IDENTITY)
    with tolerate_errors():
        tracker.finish(summary(2))
    with tolerate_errors():
        tracker.close()
    assert capsys.readouterr().out.count("not tracked") == 1


def test_unavailable_server_is_retried_after_a_pause(run, port, tmp_path):
    with mlflow_server(tmp_path / "server", port):
        tracker = tracking_mlflow.MLflow(run, IDENTITY)
    with pytest.raises(UserError):
        tracker.epoch(entry(1))
    tracker.epoch(entry(2))  # asks nobody, or it would raise


@pytest.mark.medium
@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "hangs"])
def test_unavailable_server_is_reported_before_any_output(listens, tmp_path, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
            silent.listen(8)
        port = silent.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
        refusals = []

        def begin():
            try:
                tracking_mlflow.MLflow(str(tmp_path / "run"), IDENTITY)
            except UserError as error:
                refusals.append(str(error))

        # Left to itself, MLflow's client asks for four minutes.
        thread = threading.Thread(target=begin, daemon=True)
        thread.start()
        thread.join(timeout=30)
    [line] = refusals
    assert f"http://127.0.0.1:{port}: it does not answer; check MLFLOW_TRACKING_URI" in line
    assert "secret" not in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_server_with_credentials(run, port, tmp_path, monkeypatch):
    with mlflow_server(tmp_path / "server", port, key="me:secret") as mlflow:
        with pytest.raises(UserError, match="it rejected the credentials; set MLFLOW_TRACKING_USERNAME and"):
            tracking_mlflow.MLflow(run, IDENTITY)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        tracking_mlflow.MLflow(run, IDENTITY)
        assert len(runs(mlflow)) == 1


def test_deleted_mlflow_run_is_reported_with_advice(mlflow, run):
    with open_tracker("mlflow", run, IDENTITY):
        pass
    Path(run, "mlflow.json").write_text(json.dumps({"run_id": "0" * 32}))
    with pytest.raises(
        UserError, match=r"not found.*; restore this MLflow run, or move .*run/mlflow.json away"
    ):
        tracking_mlflow.MLflow(run, IDENTITY)


def test_missing_package_and_variable_are_named(run, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with (
        pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to MLflow's address"),
        open_tracker("mlflow", run, IDENTITY),
    ):
        pass
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "jobs.train.tracking_mlflow")
    with (
        pytest.raises(UserError, match="pip install mlflow-skinny"),
        open_tracker("mlflow", run, IDENTITY),
    ):
        pass


@pytest.mark.medium
def test_mlflow_sends_no_telemetry(tmp_path):
    """In a process without the environment of a test, in which MLflow sends nothing anyway."""
    code = "import jobs.train.tracking_mlflow, mlflow.telemetry as t; print(t.get_telemetry_client())"
    asked = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert said.stdout == "None\n"
    assert not list(tmp_path.iterdir())
