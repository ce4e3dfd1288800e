"""A training that is killed, or loses a worker, resumes after its last epoch and ends as undisturbed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from jobs.train import driver
from jobs.train.driver import RECIPES, train
from jobs.train.progress import ControllerCallback, follow_progress
from scalp_core.bundles.loading import load_bundle
from scalp_core.models.recipe import load_recipe
from tests.support.sources import audited_jpegs

EPOCHS = 3
RECIPE = load_recipe("smoke", RECIPES, ["size=32", f"epochs={EPOCHS}", "architecture=test_resnet"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return audited_jpegs(tmp_path_factory.mktemp("resume"), 64).data


@pytest.fixture(scope="module")
def undisturbed(cluster, data, tmp_path_factory) -> dict[str, Any]:
    return train(data, str(tmp_path_factory.mktemp("undisturbed")), RECIPE, 1, "cpu")


def check_history(summary: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Each epoch is there once, with the losses of the undisturbed run."""
    history, expected = summary["history"], undisturbed["history"]
    assert [entry["epoch"] for entry in history] == list(range(1, EPOCHS + 1))
    for entry, other in zip(history, expected, strict=True):
        assert entry["step_losses"] == pytest.approx(other["step_losses"], rel=1e-3)
        assert entry["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
    assert summary["best_epoch"] == undisturbed["best_epoch"]


class KillAfterSecondEpoch(ControllerCallback):
    """Kill the process that controls the training when the checkpoint of epoch 2 is stored."""

    reports = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, metrics, checkpoint)
        self.reports += 1
        if self.reports == 2:
            os._exit(1)


class KillWorkerOnce:
    """Queue of notes that kills the worker in epoch 2, when the checkpoint of epoch 1 is stored."""

    def __init__(self, notes: Any, run: str) -> None:
        self._notes = notes
        self._record = Path(run, "checkpoints", "checkpoint_manager_snapshot.json")
        self._killed = Path(run, "killed")

    def put_nowait(self, note: dict[str, Any]) -> None:
        if note.get("epoch") == 2 and not self._killed.exists():
            deadline = time.monotonic() + 60
            while not self._is_stored() and time.monotonic() < deadline:
                time.sleep(0.05)
            self._killed.touch()
            os._exit(1)
        self._notes.put_nowait(note)

    def _is_stored(self) -> bool:
        try:
            return json.loads(self._record.read_text())["latest_checkpoint_result"] is not None
        except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
            return False


@contextmanager
def killing_worker(run: str, *arguments: Any) -> Iterator[KillWorkerOnce]:
    with follow_progress(run, *arguments) as notes:
        yield KillWorkerOnce(notes, run)


@pytest.mark.promise("README: a lost worker costs one epoch")
@pytest.mark.promise("README: a stopped run resumes")
@pytest.mark.promise("README: a finished run ends immediately")
def test_a_lost_worker_and_a_killed_training_cost_the_epoch_in_progress(
    data, undisturbed, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as killed:
        killed.setattr(driver, "follow_progress", killing_worker)
        killed.setattr(driver, "ControllerCallback", KillAfterSecondEpoch)
        with pytest.raises(RayActorError):
            train(data, str(run), RECIPE, 1, "cpu")
    assert not (run / "summary.json").exists()
    printed = capsys.readouterr().out
    assert "starting, workers: 1" in printed
    assert "workers failed: 1" in printed and "resuming after epoch 1, workers: 1" in printed
    assert printed.count("epoch 1/3") == 1

    resumed = train(data, str(run), RECIPE, 1, "cpu")
    printed = capsys.readouterr().out
    assert "resuming after epoch 2, workers: 1" in printed
    assert "epoch 2/3" not in printed and "epoch 3/3" in printed
    check_history(resumed, undisturbed)
    assert load_bundle(str(run)).spec.training.recipe["epochs"] == EPOCHS

    assert train(data, str(run), RECIPE, 1, "cpu") == resumed  # finished: read, not trained again
    assert "is finished" in capsys.readouterr().out
