"""The audit log as evidence: what `scalp audit verify` detects; kills, slow disks, retention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from scalp_core.errors import UserError
from serving.observability import audit_writer
from serving.observability.audit import AuditLog
from serving.observability.audit_chain import verify
from serving.observability.audit_writer import AuditSettings


def write(folder: Path, count: int, replica: str = "r", **settings: object) -> None:
    """Start a replica that writes some lines and ends."""
    log = AuditLog(AuditSettings(folder=str(folder), **settings), replica)
    for number in range(count):
        log.log_refusal(str(number), "empty")
    log.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """One chain of several files by two successive replicas."""
    write(tmp_path / "audit", 20, "one", max_bytes=2000)
    write(tmp_path / "audit", 20, "two", max_bytes=2000)
    assert len(files(tmp_path / "audit")) > 4
    return tmp_path / "audit"


def test_replicas_that_follow_each_other_continue_one_chain(folder):
    found = verify(folder)
    assert (found.chains, found.damage, len(found.heads)) == (1, [], 1)
    assert found.lines == 40 + found.files  # each file has a head


def test_replicas_at_the_same_time_have_a_chain_each(tmp_path):
    logs = [AuditLog(AuditSettings(folder=str(tmp_path)), name) for name in ("one", "two")]
    tmp_path.chmod(0o700)
    for count, log in enumerate(logs, start=1):
        log.log_refusal("a", "empty")
        wait_for(lambda count=count: len(files(tmp_path)) == count)
    for log in logs:
        log.close()
    assert (verify(tmp_path).chains, verify(tmp_path).damage) == (2, [])


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
        lambda lines: [*lines, lines[-1][:30]],
        lambda lines: [*lines[:2], "\0" * 20 + "\n", *lines[3:]],
        lambda _: [],
    ],
    ids=["edited", "removed", "head", "end", "swapped", "repeated", "torn", "zeros", "emptied"],
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
    assert f"{path.name} before it is missing" in place


def test_a_head_that_was_kept_elsewhere_detects_a_cut_end(folder):
    (head,) = verify(folder).heads.values()
    write(folder, 3)
    assert not verify(folder, [head]).damage
    last = files(folder)[-2]
    for path in files(folder)[-1:]:
        path.unlink()
    last.write_text("".join(last.read_text().splitlines(keepends=True)[:-1]))
    assert not verify(folder).damage  # nothing in the folder names the end of a chain
    assert head in verify(folder, [head]).damage[0]


def test_a_killed_writer_leaves_a_log_that_the_next_one_continues(tmp_path):
    folder = tmp_path / "audit"
    program = (
        "import sys, time\n"
        "from serving.observability.audit import AuditLog\n"
        "from serving.observability.audit_writer import AuditSettings\n"
        "log = AuditLog(AuditSettings(folder=sys.argv[1]), 'killed')\n"
        "for number in range(50): log.log_refusal(str(number), 'empty')\n"
        "time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", program, str(folder)])
    try:
        wait_for(lambda: files(folder) and files(folder)[0].read_text().count("\n") == 51)
    finally:
        killed.kill()
        killed.wait()
    with files(folder)[0].open("a") as file:
        file.write('{"seq": 51, "pre')  # as a lost page leaves it
    assert "ends within a line" in verify(folder).damage[0]
    before = files(folder)[0].read_bytes()
    write(folder, 1, "next")
    found = verify(folder)
    assert (found.chains, found.lines, found.torn, found.damage) == (1, 51 + 2, 1, [])
    assert files(folder)[0].read_bytes() == before  # what was torn stays as it is
    files(folder)[0].write_bytes(before[:-1])
    assert verify(folder).damage


def test_a_close_writes_all_that_waits_while_the_disk_is_slow(tmp_path, monkeypatch):
    folder, real = tmp_path / "audit", os.write
    monkeypatch.setattr(audit_writer, "_WAITING", 30)
    monkeypatch.setattr(audit_writer.os, "write", lambda fd, data: time.sleep(0.01) or real(fd, data))
    write(folder, 60)
    found = verify(folder)
    written = [line for path in files(folder) for line in path.read_text().splitlines() if "empty" in line]
    assert found.lost > 0 and found.lost + len(written) == 60
    assert "lines were lost" in found.damage[0]


def test_a_disk_that_was_full_leaves_a_gap_that_is_counted(tmp_path, monkeypatch):
    folder, real, full = tmp_path / "audit", os.write, False

    def cut(fd: int, data: bytes) -> int:
        if not full:
            return real(fd, data)
        if not data.startswith(b"{"):
            raise OSError(28, "No space left on device")
        return real(fd, data[:30])

    monkeypatch.setattr(audit_writer, "_RETRY_S", 0)
    monkeypatch.setattr(audit_writer.os, "write", cut)
    log = AuditLog(AuditSettings(folder=str(folder)), "r")
    log.log_refusal("before", "empty")
    wait_for(lambda: files(folder) and files(folder)[0].read_text().count("\n") == 2)
    full = True
    for _ in range(5):
        log.log_refusal("lost", "empty")
    wait_for(lambda: log._lost == 5)
    full = False
    log.log_refusal("after", "empty")
    log.close()
    found = verify(folder)
    assert (found.files, found.torn, found.lost, found.chains) == (2, 1, 5, 1)
    assert len(found.damage) == 1 and "5 lines were lost" in found.damage[0]


def test_lines_are_synced_together_and_all_by_the_end(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(audit_writer.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    write(tmp_path / "audit", 500, sync_seconds=60)
    assert len(synced) == 3  # a head, its name, the end
    assert synced[-1] == files(tmp_path / "audit")[0].stat().st_size


def test_retention_removes_old_closed_files_and_says_so(folder, monkeypatch):
    now, real, old = time.time(), time.time, files(folder)
    (folder / "notes.txt").write_text("not scalp's")
    old[1].write_text("".join(edit(old[1].read_text().splitlines(keepends=True))))
    busy = AuditLog(AuditSettings(folder=str(folder)), "busy")
    busy.log_refusal("a", "empty")
    wait_for(lambda: len(files(folder)) > len(old))
    busy_file = files(folder)[-1]
    write(folder, 1, keep_days=1)
    assert set(old) <= set(files(folder))
    monkeypatch.setattr(audit_writer.time, "time", lambda: real() + 2 * 86_400)
    write(folder, 1, keep_days=1)
    left = files(folder)
    assert set(old) & set(left) == {old[1]}  # what is damaged is evidence
    assert busy_file in left and (folder / "notes.txt").exists()
    monkeypatch.undo()
    busy.close()
    (place,) = verify(folder).damage
    assert old[1].name in place
    assert time.time() - now < 86_400


def test_what_names_removed_files_outlives_its_own_file(tmp_path, monkeypatch):
    folder, real, days = tmp_path / "audit", time.time, 0
    monkeypatch.setattr(audit_writer.time, "time", lambda: real() + days * 86_400)
    for _ in range(8):
        write(folder, 2, keep_days=2)
        days += 1
        assert verify(folder).damage == []
    assert 2 <= len(files(folder)) <= 4


def test_verify_prints_a_table_and_its_exit_code_tells(folder):
    whole = CliRunner().invoke(app, ["audit", "verify", str(folder)])
    (head,) = verify(folder).heads.values()
    assert whole.exit_code == 0 and f"head {head}" in whole.output
    files(folder)[2].unlink()
    damaged = CliRunner().invoke(app, ["audit", "verify", str(folder)])
    assert damaged.exit_code == 1 and files(folder)[2].name in damaged.output
    with pytest.raises(UserError, match="holds no audit log"):
        verify(folder.parent)


def test_lines_hold_nothing_beyond_the_chain_and_what_they_held(folder):
    lines = [json.loads(line) for path in files(folder) for line in path.read_text().splitlines()]
    chain = {"seq", "prev", "head"}
    assert {name for line in lines for name in line} - chain == {
        "time",
        "request_id",
        "key",
        "sha256",
        "problem",
        "ms",
    }
