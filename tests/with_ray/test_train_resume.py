"""Training with a fold for validation; killed, or without its worker, it resumes after its last epoch."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from joblib import cpu_count
from ray.exceptions import RayActorError

from jobs.train import driver, progress
from jobs.train.driver import RECIPES, train
from jobs.train.progress import ControllerCallback, follow_progress
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.models.recipe import load_recipe
from tests.support.sources import Audited, audited_jpegs

EPOCHS, BATCH, FOLD = 3, 8, 1
RECIPE = load_recipe(
    "smoke", RECIPES, ["size=32", f"epochs={EPOCHS}", "architecture=test_resnet", f"batch_size={BATCH}"]
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Audited:
    return audited_jpegs(tmp_path_factory.mktemp("resume"), 64, folds=3)


@pytest.fixture(scope="module")
def data(prepared) -> str:
    return prepared.data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Run directory of the undisturbed training."""
    return str(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    """Output of the undisturbed training."""
    return io.StringIO()


@ray.remote
class OtherWork:
    def is_running(self) -> bool:
        return True


@pytest.fixture(scope="module")
def undisturbed(cluster, data, run, printed) -> dict[str, Any]:
    """Summary of a training that starts while other work uses all CPUs, until that is reported."""

    @contextmanager
    def follow_beside_other_work(*arguments: Any) -> Iterator[Any]:
        with follow_progress(*arguments) as notes:
            other = OtherWork.options(num_cpus=cluster.cpus).remote()
            assert ray.get(other.is_running.remote())
            thread = threading.Thread(target=end_when_reported, args=(other,))
            thread.start()
            yield notes
            thread.join()

    def end_when_reported(other: Any) -> None:
        deadline = time.monotonic() + 60
        while "waiting for resources" not in printed.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        printed.write("other work ends\n")
        ray.kill(other)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(progress, "_POLL_S", 0.2)
        patch.setattr(progress, "_WAITING_MESSAGE_AFTER_S", 1.0)
        patch.setattr(driver, "follow_progress", follow_beside_other_work)
        return train(data, run, RECIPE, 1, "cpu", fold=FOLD)


def test_waiting_for_the_cpus_of_other_work_is_reported(cluster, undisturbed, printed):
    before, after = printed.getvalue().split("other work ends\n")
    assert (
        f"waiting for resources (workers: 1, CPUs for their data: 2); Ray has {cluster.cpus} CPUs" in before
    )
    assert "starting, workers: 1" not in before and "starting, workers: 1" in after


def test_a_fold_is_the_validation_split(prepared, run, undisturbed):
    rows = prepared.table.select(["label", "fold", "split"]).to_pylist()
    trained = [row["label"] for row in rows if row["fold"] not in (None, FOLD)]
    validated = [row for row in rows if row["fold"] == FOLD]
    assert len(validated) != sum(row["split"] == "val" for row in rows)  # so that the fold decides
    assert {entry["val_n"] for entry in undisturbed["history"]} == {len(validated)}
    assert undisturbed["validation"]["n"] == len(validated)
    assert {entry["steps"] for entry in undisturbed["history"]} == {len(trained) // BATCH}
    spec = load_bundle(run).spec
    assert spec.training.fold == FOLD
    assert spec.training.grade_counts == [trained.count(grade) for grade in range(NUM_GRADES)]
    assert f"fold {FOLD} of 3 for validation" in render_model_card(spec)

    with pytest.raises(
        UserError, match=rf"holds a run with fold {FOLD} \(now 0\); choose another RUN, or resume"
    ):
        train(prepared.data, run, RECIPE, 1, "cpu", fold=0)


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

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, metrics, checkpoint)
        if metrics[0]["epoch"] == 2:
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
            train(data, str(run), RECIPE, 1, "cpu", fold=FOLD)
    assert not (run / "summary.json").exists()
    printed = capsys.readouterr().out
    assert "starting, workers: 1" in printed
    assert "workers failed: 1" in printed and "resuming after epoch 1, workers: 1" in printed
    assert printed.count("epoch 1/3") == 1
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states == {"REMOVED"}  # or the CPUs of its workers would be missing until this process ends

    resumed = train(data, str(run), RECIPE, 1, "cpu", fold=FOLD)
    printed = capsys.readouterr().out
    assert "resuming after epoch 2, workers: 1" in printed
    assert "epoch 2/3" not in printed and "epoch 3/3" in printed
    check_history(resumed, undisturbed)
    assert load_bundle(str(run)).spec.training.recipe["epochs"] == EPOCHS

    assert train(data, str(run), RECIPE, 1, "cpu", fold=FOLD) == resumed  # finished: read, not trained again
    assert "is finished" in capsys.readouterr().out


@pytest.fixture
def threads_of_a_worker() -> Iterator[None]:
    """As many threads in this process as Ray gives a worker: sums of bf16 depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_of_a_worker")
@pytest.mark.promise("docs/training.md: one process trains as Ray does")
def test_one_process_trains_as_ray_does_and_each_resumes_the_run_of_the_other(
    data, undisturbed, tmp_path, monkeypatch, capsys
):
    run = str(tmp_path / "run")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, run, RECIPE, 1, "cpu", fold=FOLD, local=True, progress=stop)
    assert "images are decoded once into memory" in capsys.readouterr().out
    with monkeypatch.context() as killed:
        killed.setattr(driver, "ControllerCallback", KillAfterSecondEpoch)
        with pytest.raises(RayActorError):
            train(data, run, RECIPE, 1, "cpu", fold=FOLD, local=False)
    printed = capsys.readouterr().out
    assert "into Ray's object store" in printed and "resuming after epoch 1, workers: 1" in printed
    resumed = train(data, run, RECIPE, 1, "cpu", fold=FOLD, local=True)
    assert "resuming after epoch 2, workers: 1" in capsys.readouterr().out
    check_history(resumed, undisturbed)
    folders = list(Path(run, "checkpoints").glob("checkpoint_*/history.json"))
    assert 2 <= len(folders) <= 3  # the best two, and the last
