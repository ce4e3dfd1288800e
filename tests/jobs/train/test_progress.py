"""Progress of a training on the console."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

from jobs.common import console
from jobs.train.progress import Follower

STEP = {"steps": 17, "loss": 1.5, "learning_rate": 0.1, "seconds": 1.0, "waited_seconds": 0.0}


class Notes:
    """Queue with these notes."""

    def __init__(self, *notes):
        self.notes = list(notes)

    def empty(self):
        return not self.notes

    def get(self, timeout):  # noqa: ARG002
        return self.notes.pop(0)


class Metrics(nullcontext):
    def note(self, note):
        pass


def test_progress_counts_the_steps_of_all_epochs(monkeypatch, capsys):
    monkeypatch.setattr(console, "_REPORT_INTERVAL_S", -1.0)
    notes = Notes(
        {"workers": 2, "after": 0}, {"epoch": 1, "step": 5, **STEP}, {"epoch": 3, "step": 17, **STEP}
    )
    follower = Follower(notes, 6, SimpleNamespace(), 2, Metrics())
    follower.stop.set()
    follower.run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting, workers: 2"
    assert lines[1].startswith("training, steps: 5 of 102 loss 1.500")
    assert lines[2].startswith("training, steps: 51 of 102 loss 1.500")


def test_each_line_of_a_training_among_others_names_it(monkeypatch, capsys):
    monkeypatch.setattr(console, "_REPORT_INTERVAL_S", -1.0)
    notes = Notes({"workers": 2, "after": 1}, {"epoch": 2, "step": 5, **STEP}, {"lost": 1})
    follower = Follower(notes, 6, SimpleNamespace(), 2, Metrics(), "fold-3: ", as_lines=True)
    follower.stop.set()
    follower.run()
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == ["fold-3:"] * 3
