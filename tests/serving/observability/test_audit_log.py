"""Audit log of the endpoint: content of its lines, and rotation of its files."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from scalp_core.errors import UserError
from serving.http import request_context
from serving.observability import audit_chain
from serving.observability.audit import AuditLog
from serving.observability.audit_writer import AuditSettings
from serving.schemas.grading import GradeResponse

ANSWER = GradeResponse(
    image_id="ab",
    sha256="ab" * 32,
    grade=2,
    grade_name="moderate",
    probabilities=[0.1, 0.2, 0.3, 0.4],
    expected_severity=2.0,
    grade_set=[2, 3],
    unlikeness=None,
    refer=True,
    refer_reasons=["doubtful"],
    notes=[],
    model_version="m-1",
    computed_by="cpu fp32 openvino",
    graded_at=datetime.now(UTC),
)


def lines(folder: Path) -> list[dict]:
    files = sorted(folder.glob("audit-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def request_of_ann():
    request = request_context.RequestContext("visit-7", key="ann", owes_audit=True)
    request_context.set_current(request)
    yield request
    request_context.set_current(request_context.RequestContext(""))


def test_a_line_tells_what_was_asked_and_answered(tmp_path, request_of_ann):
    log = AuditLog(AuditSettings(folder=str(tmp_path / "audit")))
    log.log_grade(ANSWER)
    log.log_refusal("cd" * 32, "truncated")
    log.log_request()  # its images have their lines
    log.close()
    graded, refused = lines(tmp_path / "audit")
    assert abs(datetime.fromisoformat(graded.pop("time")).timestamp() - time.time()) < 60
    assert graded.pop("ms") >= 0
    assert (graded.pop("seq"), graded.pop("prev")) == (0, None)
    assert graded == {
        "request_id": "visit-7",
        "key": "ann",
        "sha256": "ab" * 32,
        "model_version": "m-1",
        "grade": 2,
        "probabilities": [0.1, 0.2, 0.3, 0.4],
        "refer": True,
        "refer_reasons": ["doubtful"],
    }
    assert (refused["sha256"], refused["problem"]) == ("cd" * 32, "truncated")


def test_a_request_without_a_photograph_has_one_line_and_one_that_was_kept_out_none(tmp_path, request_of_ann):
    log = AuditLog(AuditSettings(folder=str(tmp_path / "audit")))
    request_of_ann.problem, request_of_ann.status = "no_file", 422
    log.log_request()
    log.log_request()
    request_context.set_current(request_context.RequestContext("kept-out", problem="wrong_key"))
    log.log_request()
    log.close()
    (line,) = lines(tmp_path / "audit")
    assert (line["request_id"], line["status"], line["problem"], line["sha256"]) == (
        "visit-7",
        422,
        "no_file",
        None,
    )


def test_nobody_else_may_look(tmp_path, request_of_ann):
    folder = tmp_path / "made" / "audit"
    log = AuditLog(AuditSettings(folder=str(folder)))
    log.log_grade(ANSWER)
    log.close()
    (file,) = folder.glob("audit-*")
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    folder.chmod(0o750)
    with pytest.raises(UserError, match=f"chmod 700 {folder}"):
        AuditLog(AuditSettings(folder=str(folder)))
    with pytest.raises(UserError, match="cannot be written to"):
        AuditLog(AuditSettings(folder=str(file)))


def test_files_follow_each_other_by_size_and_no_line_is_lost(tmp_path, request_of_ann):
    for number in range(40):
        log = AuditLog(AuditSettings(folder=str(tmp_path / "audit"), max_bytes=1500))
        log.log_refusal(str(number), "empty")
        log.close()
    assert [line["sha256"] for line in lines(tmp_path / "audit")] == [str(number) for number in range(40)]
    sizes = [file.stat().st_size for file in sorted((tmp_path / "audit").glob("audit-*"))]
    assert len(sizes) > 4 and all(1500 <= size < 2000 for size in sizes[:-1])


def test_a_full_disk_is_logged_and_refuses_nobody(tmp_path, request_of_ann, monkeypatch, caplog):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    log = AuditLog(AuditSettings(folder=str(tmp_path / "audit")))
    monkeypatch.setattr(audit_chain.os, "write", full)
    for _ in range(50):
        log.log_grade(ANSWER)
    log.close()
    record, last = caplog.records  # once in a while, not for each line
    assert "lines of the audit log were lost" in record.message and "No space left" in record.message
    assert "ended with 50 lines lost" in last.message
