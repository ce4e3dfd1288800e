"""The job that `scalp submit` starts on a cluster: what it keeps of the log, and what it leaves behind."""

from __future__ import annotations

import json
import sys

import pytest

from jobs.submit import entry
from jobs.submit.entry import _Kept
from scalp_core import storage
from scalp_core.storage import outputs

MINUTE = b"grading: 1,000 of 9,000\n" * 40


@pytest.fixture
def out(tmp_path):
    """A directory that a verb has made."""
    (tmp_path / "out").mkdir()
    outputs.claim_output(str(tmp_path / "out"), "grade")
    return tmp_path / "out"


def test_a_log_is_stored_in_time_that_grows_with_it(out, monkeypatch):
    """The whole log was sent each minute: 30 times its size after an hour."""
    sent, write = [], storage.write
    monkeypatch.setattr(storage, "write", lambda uri, data: sent.append(len(data)) or write(uri, data))
    kept = _Kept(f"{out}/jobs/a.1.log")
    for _ in range(60):
        kept.add(MINUTE)
        kept.keep_new()
    assert sum(sent) == 60 * len(MINUTE)
    pieces = sorted((out / "jobs").iterdir())
    assert b"".join(piece.read_bytes() for piece in pieces) == 60 * MINUTE  # of a head that is lost
    kept.keep_all()
    assert {path.name: path.read_bytes() for path in (out / "jobs").iterdir()} == {"a.1.log": 60 * MINUTE}


def test_nothing_is_written_into_a_folder_that_no_verb_made(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    kept = _Kept(f"{tmp_path}/jobs/a.1.log")
    kept.print("scalp: that folder is not empty\n")
    kept.keep_new()
    kept.keep_all()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_log_that_cannot_be_kept_stops_no_work(out, capfd):
    (out / "jobs").write_text("a file where the folder should be")
    kept = _Kept(f"{out}/jobs/a.1.log")
    kept.print("graded\n")
    kept.keep_new()
    kept.keep_all()
    printed = capfd.readouterr()
    assert printed.out == "graded\n"
    assert printed.err.count("the log is not kept") == 2


def test_the_driver_that_compares_versions_is_gone_before_the_verb_begins(tmp_path, monkeypatch):
    happened = []
    (tmp_path / "versions.json").write_text(json.dumps({"timm": "1"}))
    monkeypatch.setattr(sys, "argv", ["entry", "--versions", str(tmp_path / "versions.json"), "grade", "a"])
    monkeypatch.setattr(entry, "connect", lambda: happened.append("connected"))
    monkeypatch.setattr(entry, "run_on_each_node", lambda _: {"127.0.0.1": {"timm": "1"}})
    monkeypatch.setattr(entry.ray, "shutdown", lambda: happened.append("disconnected"))
    monkeypatch.setattr(entry, "_run", lambda words, _: happened.append(" ".join(words)) or 0)
    assert entry.main() == 0
    assert happened == ["connected", "disconnected", "grade a"]
