"""Training metrics when workers are lost: work that is done twice counts twice."""

from collections import Counter as Counts

import pytest
from ray.util.metrics import Counter, Gauge

from jobs.common.prometheus import TrainMetrics


@pytest.fixture
def counted(monkeypatch):
    """Counters by name and stage, and the last value of each gauge."""
    counts, said = Counts(), {}

    def inc(counter, value, tags):
        counts[" ".join([counter.info["name"], *(tags[key] for key in tags if key != "run")])] += value

    monkeypatch.setattr(Counter, "inc", inc)
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, _: said.update({gauge.info["name"]: value}))
    return counts, said


def step(epoch: int, number: int, seconds: float, waited: float) -> dict:
    note = {"epoch": epoch, "step": number, "steps": 10, "loss": 1.0, "learning_rate": 0.1}
    return note | {"seconds": seconds, "waited_seconds": waited}


def test_an_epoch_that_is_done_again_counts_again(counted):
    counts, said = counted
    metrics = TrainMetrics("s3://clinic/runs/first/", 2, 16)
    notes = [{"workers": 2, "after": 0}, step(1, 4, 4.0, 1.0), step(1, 10, 10.0, 2.0)]
    notes += [{"epoch_done": {"seconds": 13.0, "val_qwk": 0.5}}, {"kept": 1}, step(2, 5, 5.0, 1.0)]
    for note in [*notes, {"lost": 1}]:
        metrics.note(note)
    assert (said["scalp_train_workers"], said["scalp_train_restarts"]) == (0, 0)
    assert said["scalp_train_epoch"] == 1.5
    metrics.note({"workers": 2, "after": 1})
    assert (said["scalp_train_workers"], said["scalp_train_restarts"]) == (2, 1)
    assert said["scalp_train_epoch"] == 1
    metrics.note(step(2, 10, 10.0, 2.0))
    metrics.note({"workers": 3, "after": 1})  # a node has joined, nothing was lost
    assert said["scalp_train_restarts"] == 1
    assert counts == {
        "scalp_train_steps": 25,
        "scalp_train_photographs": 400,
        "scalp_train_seconds data": 5.0,
        "scalp_train_seconds steps": 20.0,
        "scalp_train_seconds validation": 3.0,
        "scalp_train_checkpoints": 1,
    }
