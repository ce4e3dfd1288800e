"""Entry point of a job of `scalp submit`: its stored log, and the check of versions."""

from __future__ import annotations

import json
import sys

import pytest

from jobs.submit import entry
from jobs.submit.entry import _StoredLog
from scalp_core.storage import outputs

MINUTE = b"grading: 1,000 of 9,000\n" * 40


@pytest.fixture
def out(tmp_path):
    """An output directory of a command."""
    (tmp_path / "out").mkdir()
    outputs.claim_output(str(tmp_path / "out"), "grade")
    return tmp_path / "out"


def test_the_log_so_far_outlives_the_head(out):
    log = _StoredLog(f"{out}/jobs/a.1.log")
    for minutes in range(1, 4):
        log.add(MINUTE)
        log.store()
        stored = {path.name: path.read_bytes() for path in (out / "jobs").iterdir()}
        assert stored == {"a.1.log": minutes * MINUTE}


def test_no_log_is_written_into_a_folder_that_scalp_did_not_make(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    log = _StoredLog(f"{tmp_path}/jobs/a.1.log")
    log.add(b"error: that folder is not empty\n")
    log.store()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_log_that_cannot_be_stored_does_not_stop_the_command(out, capfd):
    (out / "jobs").write_text("a file where the folder should be")
    log = _StoredLog(f"{out}/jobs/a.1.log")
    log.add(b"graded\n")
    log.store()
    printed = capfd.readouterr()
    assert printed.out == "graded\n"
    assert printed.err.count("the log is not stored") == 1


def test_the_driver_that_compares_versions_is_gone_before_the_command_starts(tmp_path, monkeypatch):
    happened = []
    (tmp_path / "versions.json").write_text(json.dumps({"timm": "1"}))
    monkeypatch.setattr(sys, "argv", ["entry", "--versions", str(tmp_path / "versions.json"), "grade", "a"])
    monkeypatch.setattr(entry, "connect", lambda: happened.append("connected"))
    monkeypatch.setattr(entry, "run_on_each_node", lambda _: {"127.0.0.1": {"timm": "1"}})
    monkeypatch.setattr(entry.ray, "shutdown", lambda: happened.append("disconnected"))
    monkeypatch.setattr(entry, "_run", lambda words, _: happened.append(" ".join(words)) or 0)
    assert entry.main() == 0
    assert happened == ["connected", "disconnected", "grade a"]


@pytest.mark.promise("README: nodes are checked before long work")
def test_other_packages_on_a_node_refuse_the_command(tmp_path, monkeypatch, capfd):
    here = {"timm": "1.0.2", "torch": "2.9.1", "python": "3.11.9", "scalp": "1"}
    there = {"timm": "1.0.1", "torch": "2.9.1+cu130", "python": "3.11.2"}
    (tmp_path / "versions.json").write_text(json.dumps(here))
    monkeypatch.setattr(sys, "argv", ["entry", "--versions", str(tmp_path / "versions.json"), "grade", "a"])
    monkeypatch.setattr(entry, "connect", lambda: None)
    monkeypatch.setattr(entry.ray, "shutdown", lambda: None)
    monkeypatch.setattr(entry, "run_on_each_node", lambda _: {"10.0.0.1": here, "10.0.0.2": there})
    monkeypatch.setattr(entry, "_run", None)  # the command does not start
    assert entry.main() == 2
    problem, fix = capfd.readouterr().out.splitlines()
    assert problem == "error: node 10.0.0.2 has timm 1.0.1 there and 1.0.2 here"
    assert fix.startswith("hint:  install both from one")


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_a_job_ends_with_the_exit_code_of_its_command(monkeypatch, capfd, ending, code):
    """`jobs.cli` is replaced by a program that prints and ends."""
    popen = entry.subprocess.Popen

    def replaced(command, **keywords):
        assert command[1:] == ["-m", "jobs.cli", "grade", "a"]
        return popen([command[0], "-c", f"import os, sys; print('graded', flush=True); {ending}"], **keywords)

    monkeypatch.setattr(entry.subprocess, "Popen", replaced)
    monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["entry", "grade", "a"])
    assert entry.main() == code
    assert capfd.readouterr().out == "graded\n"
