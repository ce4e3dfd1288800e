"""Audit log: one line per graded or refused image, without its content."""

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
    """Settings of the audit log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = Field(
        None, description="directory on each node, closed to other users; None turns the log off"
    )
    max_bytes: int = Field(64 * 2**20, ge=1, description="size of one file, after which the next one begins")
    max_hours: float = Field(
        24, gt=0, description="age of one file in hours, after which the next one begins"
    )
    sync_seconds: float = Field(0.2, ge=0, description="longest time from a line to its fsync")
    keep_days: float | None = Field(
        None, gt=0, description="age in days at which closed files are removed; None keeps all"
    )


class AuditLog:
    """Audit log of one replica, written by a background thread.

    Args:
        settings: Settings with a folder.
        replica: Id of the replica; part of the file names.

    Raises:
        UserError: The folder cannot be created, or other users can read it.
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
        """Log an image that was graded in the current request."""
        self._write(
            answer.sha256,
            model_version=answer.model_version,
            grade=answer.grade,
            probabilities=[round(probability, 6) for probability in answer.probabilities],
            refer=answer.refer,
            refer_reasons=answer.refer_reasons,
        )

    def log_candidate(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        """Log the gradings of an image by the first model and the candidate, or the candidate's error."""
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
        """Log an image that was refused in the current request."""
        self._write(sha256, problem=code)

    def log_request(self) -> None:
        """Log the end of the current request, unless its images have lines.

        Requests that failed the authorization are not logged, so that they cannot fill the disk.
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
        """Write and fsync all queued lines; log an error if lines were lost."""
        self._writer.close()

    def _write(self, sha256: str | None, **answer: object) -> None:
        request = request_context.current()
        request.owes_audit = False
        self._put(request, sha256, **answer, ms=request.ms)

    def _put(self, request: request_context.RequestContext, sha256: str | None, **answer: object) -> None:
        line = {"time": timestamp(), "request_id": request.request_id, "key": request.key, "sha256": sha256}
        self._writer.put({**line, **answer})


def open_log(settings: AuditSettings, replica: str) -> AuditLog | None:
    """Open the audit log of a replica; None if it is turned off.

    Raises:
        UserError: As `AuditLog`.
    """
    return AuditLog(settings, replica) if settings.folder else None


def open_folder(settings: AuditSettings) -> Path:
    """Create the folder if it is missing, and check its permissions.

    Raises:
        UserError: The folder cannot be created, or other users can read it.
    """
    folder = Path(settings.folder or "").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"the audit log cannot be written to {folder}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"other users can read the audit log in {folder}; run: chmod 700 {folder}")
    return folder
