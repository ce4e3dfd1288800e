"""The audit log: a line for each image that was graded or refused, and nothing of what is in it."""

from __future__ import annotations

import stat
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import UserError
from serving.http import request_context
from serving.observability.audit_writer import Writer, timestamp
from serving.schemas.grading import GradeResponse
from serving.schemas.messages import Graded


class AuditSettings(BaseModel):
    """Where the audit log is kept, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = Field(
        None, description="on the disk of each node, closed to others; without one nothing is logged"
    )
    max_bytes: int = Field(64 * 2**20, ge=1, description="of one file; then the next one begins")
    max_hours: float = Field(24, gt=0, description="that one file is written to; then the next one begins")
    sync_seconds: float = Field(
        0.2, ge=0, description="after which a written line is on the disk at the latest (fsync)"
    )
    keep_days: float | None = Field(
        None, gt=0, description="after which a closed file is removed; without it all are kept"
    )


class AuditLog:
    """The log of one replica. Lines are written by a thread of its own.

    Args:
        settings: with a folder.
        replica: whose log it is; part of the names of its files.

    Raises:
        UserError: the folder cannot be made, or others may look into it.
    """

    def __init__(self, settings: AuditSettings, replica: str) -> None:
        self._writer = Writer(
            open_folder(settings),
            replica,
            max_bytes=settings.max_bytes,
            max_hours=settings.max_hours,
            sync_seconds=settings.sync_seconds,
            keep_days=settings.keep_days,
        )

    def log_grade(self, answer: GradeResponse) -> None:
        """An image was graded in the current request."""
        self._write(
            answer.sha256,
            model_version=answer.model_version,
            grade=answer.grade,
            probabilities=[round(probability, 6) for probability in answer.probabilities],
            refer=answer.refer,
            refer_reasons=answer.refer_reasons,
        )

    def log_candidate(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        """A candidate graded an image that `first` answered, or failed, and `candidate` is why."""
        request = request_context.current()
        line: dict[str, object] = {"candidate_error": candidate} if isinstance(candidate, str) else {}
        for name, graded in (("first", first), ("candidate", candidate)):
            if isinstance(graded, Graded):
                line[name] = {
                    "model_version": graded.signature.model_version,
                    "grade": graded.grading.grade,
                    "expected_severity": round(graded.grading.expected_severity, 6),
                    "refer": graded.grading.refer,
                    "forward_ms": round(1000 * graded.forward_seconds, 2),
                }
        self._put(request, sha256, **line)

    def log_refusal(self, sha256: str, code: str) -> None:
        """An image was refused in the current request."""
        self._write(sha256, problem=code)

    def log_request(self) -> None:
        """The current request is over. It gets a line of its own unless its images have theirs.

        Requests that were not let in get none, or anybody could fill the disk.
        """
        request = request_context.current()
        if request.owes_audit:
            bulk = {"work": request.work, "source": request.source}
            self._write(
                None,
                route=request.route,
                status=request.status,
                problem=request.problem,
                **{name: value for name, value in bulk.items() if value is not None},
            )

    def close(self) -> None:
        """Writes and fsyncs all queued lines; logs an error when lines were lost."""
        self._writer.close()

    def _write(self, sha256: str | None, **answer: object) -> None:
        request = request_context.current()
        request.owes_audit = False
        self._put(request, sha256, **answer, ms=request.ms)

    def _put(self, request: request_context.RequestContext, sha256: str | None, **answer: object) -> None:
        line = {"time": timestamp(), "request_id": request.request_id, "key": request.key, "sha256": sha256}
        self._writer.put({**line, **answer})


def open_log(settings: AuditSettings, replica: str) -> AuditLog | None:
    """The log of a replica, when there is to be one.

    Raises:
        UserError: as `AuditLog`.
    """
    return AuditLog(settings, replica) if settings.folder else None


def open_folder(settings: AuditSettings) -> Path:
    """The folder, made when it is missing.

    Raises:
        UserError: it cannot be made, or others may look into it.
    """
    folder = Path(settings.folder or "").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"the audit log cannot be kept in {folder}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"others may look into the audit log in {folder}; run: chmod 700 {folder}")
    return folder
