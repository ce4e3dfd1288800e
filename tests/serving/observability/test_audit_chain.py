"""The audit log as evidence: what `scalp audit verify` detects; kills, slow disks, retention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from scalp_core.errors import UserError
from serving.observability import audit_chain, audit_writer
from serving.observability.audit import AuditLog
from serving.observability.audit_chain import verify
from serving.observability.audit_writer import AuditSettings


def write(folder: Path, count: int, **settings: object) -> None:
    """Start a replica that writes some lines and ends."""
    log = AuditLog(AuditSettings(folder=str(folder), **settings))
    for number in range(count):
        log.log_refusal(str(number), "empty")
    log.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A chain of several files by successive replicas."""
    for _ in range(8):
        write(tmp_path / "audit", 5, max_bytes=2000)
    assert len(files(tmp_path / "audit")) > 3
    return tmp_path / "audit"


def test_all_replicas_continue_one_chain(folder):
    found = verify(folder)
    assert (found.damage, found.lines) == ([], 40)
    logs = [AuditLog(AuditSettings(folder=str(folder))) for _ in range(3)]
    for number in range(100):
        logs[number % 3].log_refusal("a", "empty")
    for log in logs:
        log.close()
    assert (verify(folder).damage, verify(folder).lines) == ([], 140)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def edit(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("empty", "fine"), *lines[2:]]


@pytest.mark.parametrize(
    "change",
    [
        edit,
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: lines[1:],
        lambda lines: lines[:-1],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines[:2], "\0" * 20 + "\n", *lines[3:]],
        lambda _: [],
    ],
    ids=["edited", "removed", "head", "end", "swapped", "repeated", "zeros", "emptied"],
)
def test_each_change_within_a_chain_is_detected_and_its_file_named(folder, change):
    path = files(folder)[1]
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    damage = verify(folder).damage
    assert damage and {place.split(":")[0] for place in damage} <= {file.name for file in files(folder)[1:3]}


def test_a_missing_file_is_detected(folder):
    path = files(folder)[1]
    path.unlink()
    (place,) = verify(folder).damage
    assert place.startswith(files(folder)[1].name)
    files(folder)[0].unlink()
    assert any("first" in place and "missing" in place for place in verify(folder).damage)


def test_a_head_that_was_kept_elsewhere_detects_a_cut_end(folder):
    head = verify(folder).head
    write(folder, 3)
    assert not verify(folder, [head]).damage
    last = files(folder)[-1]
    last.write_text("".join(last.read_text().splitlines(keepends=True)[:-4]))
    assert not verify(folder).damage  # nothing in the folder names the end of the chain
    assert head in verify(folder, [head]).damage[0]


@pytest.mark.medium
def test_a_killed_writer_leaves_a_log_that_the_next_one_continues(tmp_path):
    folder = tmp_path / "audit"
    program = (
        "import sys, time\n"
        "from serving.observability.audit import AuditLog\n"
        "from serving.observability.audit_writer import AuditSettings\n"
        "log = AuditLog(AuditSettings(folder=sys.argv[1]))\n"
        "for number in range(50): log.log_refusal(str(number), 'empty')\n"
        "time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    try:
        wait_for(lambda: files(folder) and files(folder)[0].read_text().count("\n") == 50)
    finally:
        killed.kill()
        killed.wait()
    whole = files(folder)[0].read_text()
    for piece in ('{"seq": 50, "pre', whole.splitlines()[-1]):  # as a kill leaves it
        files(folder)[0].write_text(whole + piece)
        assert (verify(folder).torn, verify(folder).damage) == (1, [])
        write(folder, 1)
        found = verify(folder)
        assert (found.lines, found.torn, found.damage) == (51, 1, [])
    lines = files(folder)[0].read_text().splitlines(keepends=True)
    files(folder)[0].write_text("".join([*lines[:49], *lines[50:]]))
    assert verify(folder).damage


def test_a_close_writes_all_that_waits_and_counts_what_is_lost(tmp_path, monkeypatch):
    folder = tmp_path / "audit"
    monkeypatch.setattr(audit_writer, "_WAITING", 30)
    monkeypatch.setattr(audit_writer, "_BATCH_S", 3600)
    write(folder, 60)
    found = verify(folder)
    written = [line for path in files(folder) for line in path.read_text().splitlines() if "empty" in line]
    assert (len(written), found.lost) == (30, 30)
    assert "30 lines were lost" in found.damage[0]


def test_a_disk_that_was_full_leaves_a_gap_that_is_counted(tmp_path, monkeypatch):
    folder, real, full = tmp_path / "audit", os.write, False

    def cut(fd: int, data: bytes) -> int:
        if not full:
            return real(fd, data)
        if not data.startswith(b"{"):
            raise OSError(28, "No space left on device")
        return real(fd, data[:30])

    monkeypatch.setattr(audit_writer, "_BATCH_S", 0.01)
    monkeypatch.setattr(audit_chain.os, "write", cut)
    log = AuditLog(AuditSettings(folder=str(folder)))
    log.log_refusal("before", "empty")
    wait_for(lambda: files(folder) and files(folder)[0].read_text().count("\n") == 1)
    full = True
    for _ in range(5):
        log.log_refusal("lost", "empty")
    wait_for(lambda: log._lost == 5)
    full = False
    log.log_refusal("after", "empty")
    log.close()
    found = verify(folder)
    assert (found.files, found.torn, found.lost) == (1, 0, 5)
    assert len(found.damage) == 1 and "5 lines were lost" in found.damage[0]


def test_lines_are_synced_together(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(audit_chain.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    monkeypatch.setattr(audit_writer, "_BATCH_S", 3600)
    write(tmp_path / "audit", 500)
    assert len(synced) == 2  # the lines, and the name of the file
    assert synced[0] == files(tmp_path / "audit")[0].stat().st_size


def test_retention_removes_old_files_and_says_so(folder):
    old, other = files(folder)[:2], folder / "notes.txt"
    other.write_text("not scalp's")
    two_days_ago = time.time() - 2 * 86_400
    for path in (*old, other):
        os.utime(path, (two_days_ago, two_days_ago))
    write(folder, 1, keep_days=3, max_bytes=1)
    assert set(old) <= set(files(folder))
    write(folder, 1, keep_days=1, max_bytes=1)
    left = files(folder)
    assert not set(old) & set(left) and other.exists()
    assert verify(folder).damage == []
    left[0].unlink()
    assert "retention removed" in verify(folder).damage[0]
    for path in left[1:]:
        os.utime(path, (two_days_ago, two_days_ago))
    write(folder, 1, keep_days=1, max_bytes=1)
    assert (len(files(folder)), verify(folder).damage) == (1, [])


def test_verify_prints_a_table_and_its_exit_code_tells(folder):
    whole = CliRunner().invoke(app, ["audit", "verify", str(folder)])
    assert whole.exit_code == 0 and f"head {verify(folder).head}" in whole.output
    files(folder)[2].unlink()
    damaged = CliRunner().invoke(app, ["audit", "verify", str(folder)])
    assert damaged.exit_code == 1 and files(folder)[2].name in damaged.output
    as_json = CliRunner().invoke(app, ["audit", "verify", str(folder), "--json"])
    assert as_json.exit_code == 1 and json.loads(as_json.stdout) == asdict(verify(folder))
    with pytest.raises(UserError, match="holds no audit log"):
        verify(folder.parent)
    in_s3 = CliRunner().invoke(app, ["audit", "verify", "s3://clinic/audit"])
    assert str(in_s3.exception).startswith("s3://clinic/audit is in S3; copy it")


def test_log_in_s3_is_refused_instead_of_a_local_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^audit log s3://clinic/audit is not a local folder; choose one"):
        AuditLog(AuditSettings(folder="s3://clinic/audit"))
    assert list(tmp_path.iterdir()) == []


def test_lines_hold_nothing_beyond_the_chain_and_what_they_held(folder):
    lines = [json.loads(line) for path in files(folder) for line in path.read_text().splitlines()]
    chain = {"seq", "prev"}
    assert {name for line in lines for name in line} - chain == {
        "time",
        "request_id",
        "key",
        "sha256",
        "problem",
        "ms",
    }
