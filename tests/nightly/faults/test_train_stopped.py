"""A training that is killed goes on after its last epoch when its command is run again, in MLflow too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalp_core.bundles.loading import load_bundle
from tests.support.mlflow_api import mlflow_server
from tests.support.ports import free_port

EPOCHS = 5


def command(pipeline, run: Path, tracking: str = "mlflow") -> list[str]:
    recipe = ["--recipe", "smoke", "--set", "size=64", "--set", f"epochs={EPOCHS}", "--workers", "1"]
    rest = ["--device", "cpu", "--tracking", tracking]
    return [sys.executable, "-m", "jobs.cli", "train", str(pipeline.data), str(run), *recipe, *rest]


def committed_history(run: Path) -> list[dict]:
    """The epochs of the checkpoint that Ray would restore; a checkpoint not yet in its record is lost."""
    try:
        record = json.loads((run / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or just being written
        return []
    latest = record["latest_checkpoint_result"]
    if latest is None:
        return []
    return json.loads((run / "checkpoints" / latest["checkpoint_dir_name"] / "history.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_training_goes_on_after_its_last_epoch(pipeline, tmp_path, monkeypatch):
    run, port = tmp_path / "run", free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with mlflow_server(tmp_path / "mlflow", port) as mlflow:
        _kill_and_go_on(pipeline, run)
        history = json.loads((run / "summary.json").read_text())["history"]
        [logged] = mlflow.search_runs([mlflow.get_experiment_by_name("scalp").experiment_id])
        assert logged.info.status == "FINISHED"
        for name, key in (("loss/validation", "val_loss"), ("loss/training", "train_loss")):
            sent = sorted(
                (each.step, each.value) for each in mlflow.get_metric_history(logged.info.run_id, name)
            )
            assert sent == [(entry["epoch"], pytest.approx(entry[key], rel=0.05)) for entry in history]


def _kill_and_go_on(pipeline, run):
    process = subprocess.Popen(
        command(pipeline, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not committed_history(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the driver; Ray ends what belonged to it
    process.wait()
    before = committed_history(run)
    assert 1 <= len(before) < EPOCHS
    assert not (run / "summary.json").exists()

    again = subprocess.run(command(pipeline, run), capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch" in again.stdout
    history = json.loads((run / "summary.json").read_text())["history"]
    assert [entry["epoch"] for entry in history] == list(range(1, EPOCHS + 1))
    assert history[: len(before)] == before
    assert load_bundle(str(run)).spec.training.recipe["epochs"] == EPOCHS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_a_training_with_its_exit_code_and_a_message(pipeline, tmp_path):
    words = ["env", "--default-signal=INT", *command(pipeline, tmp_path / "run", "none")]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not committed_history(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "scalp: stopped; run the same command again to resume" in errors and "Traceback" not in errors
