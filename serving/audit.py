"""The audit log: a line for each photograph that was graded or refused, and nothing of what is in it."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import stat
import sys
import time
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import BaseRotatingHandler, QueueHandler, QueueListener
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import UserError
from serving import visit
from serving.answers import Graded
from serving.schemas import GradeResponse

_WAITING = 10_000  # lines that wait for the disk; beyond them lines are lost, and that is logged
_NAME = re.compile(r"audit-(?P<began>\d{8}T\d{12})Z-.+\.jsonl")
_TIME = "%Y%m%dT%H%M%S%f"
_HOUR = 3600
_SAY_AGAIN_S = 60

_log = logging.getLogger("ray.serve")


class AuditSettings(BaseModel):
    """Where the audit log is kept, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = Field(
        None, description="on the disk of each node, closed to others; without one nothing is logged"
    )
    max_bytes: int = Field(64 * 2**20, ge=1, description="of one file; then the next one begins")
    max_hours: float = Field(24, gt=0, description="that one file is written to; then the next one begins")
    keep: int | None = Field(
        None, ge=1, description="files in the folder; the oldest are removed. Without it none ever is"
    )


class _Files(BaseRotatingHandler):
    """Writes files that are named by the time they begin at, and renames none: what is written stays.

    The handlers of the standard library rotate by size or by time, not by both, and rename.
    """

    def __init__(self, settings: AuditSettings, folder: Path, replica: str) -> None:
        self._settings = settings
        self._folder = folder
        self._replica = re.sub(r"[^\w.-]", "_", replica)
        self._began = 0.0
        super().__init__(self._next_name(), "a", encoding="utf-8", delay=True)

    def _next_name(self) -> str:
        self._began = time.time()
        began = datetime.fromtimestamp(self._began, UTC).strftime(_TIME)
        return str(self._folder / f"audit-{began}Z-{self._replica}.jsonl")

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_private)

    def shouldRollover(self, _record: logging.LogRecord) -> bool:  # noqa: N802
        if time.time() - self._began >= self._settings.max_hours * _HOUR:
            return True
        # It ends with the line that reaches the size.
        return self.stream is not None and self.stream.tell() >= self._settings.max_bytes

    def doRollover(self) -> None:  # noqa: N802
        if self.stream is not None:
            self.stream.close()
            self.stream = None  # opened again by the next line
        self.baseFilename = self._next_name()
        if self._settings.keep is not None:
            self._remove_oldest(self._settings.keep)

    def _remove_oldest(self, keep: int) -> None:
        """Of all replicas' files, those that none of them writes to any more."""
        files = sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        for path in files[: max(0, len(files) + 1 - keep)]:
            if time.time() - _beginning(path.name) > (self._settings.max_hours + 1) * _HOUR:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    _log.warning("an old file of the audit log stays: %s", error)

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802
        _tell_lost(f"it cannot be written ({sys.exc_info()[1]})")


class _Lost:
    """Lines that were lost, and when that was said last."""

    lines = 0
    said = -math.inf


def _tell_lost(why: str) -> None:
    _Lost.lines += 1
    now = time.monotonic()
    if now - _Lost.said > _SAY_AGAIN_S:
        _log.error("lines of the audit log were lost so far: %d; %s", _Lost.lines, why)
        _Lost.said = now


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class _Queue(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # it is a finished line, and stays in this process

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802
        _tell_lost("the disk does not keep up")


class AuditLog:
    """The log of one replica. Lines are written by a thread of its own.

    Args:
        settings: with a folder.
        replica: whose log it is; part of the names of its files.

    Raises:
        UserError: the folder cannot be made, or others may look into it.
    """

    def __init__(self, settings: AuditSettings, replica: str) -> None:
        folder = open_folder(settings)
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(_WAITING)
        files = _Files(settings, folder, replica)
        self._queue = _Queue(waiting)
        self._listener = QueueListener(waiting, files)
        self._files = files
        self._listener.start()

    def graded(self, answer: GradeResponse) -> None:
        """A photograph was graded in the current request."""
        self._write(
            answer.sha256,
            model_version=answer.model_version,
            grade=answer.grade,
            probabilities=[round(probability, 6) for probability in answer.probabilities],
            refer=answer.refer,
            refer_reasons=answer.refer_reasons,
        )

    def tried(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        """A candidate graded a photograph that `first` answered, or failed, and `candidate` is why."""
        request = visit.current()
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

    def refused(self, sha256: str, code: str) -> None:
        """A photograph was refused in the current request."""
        self._write(sha256, problem=code)

    def answered(self) -> None:
        """The current request is over. It gets a line of its own unless its photographs have theirs.

        Requests that were not let in get none, or anybody could fill the disk.
        """
        request = visit.current()
        if request.owes_audit:
            self._write(None, route=request.route, status=request.status, problem=request.problem)

    def close(self) -> None:
        """Writes what waits, and ends."""
        self._listener.stop()
        self._files.close()

    def _write(self, sha256: str | None, **answer: object) -> None:
        request = visit.current()
        request.owes_audit = False
        self._put(request, sha256, **answer, ms=request.ms)

    def _put(self, request: visit.Visit, sha256: str | None, **answer: object) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request.request_id,
            "key": request.key,
            "sha256": sha256,
            **answer,
        }
        text = json.dumps(line, ensure_ascii=False)
        self._queue.handle(logging.LogRecord("audit", logging.INFO, "", 0, text, None, None))


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


def _beginning(name: str) -> float:
    match = _NAME.fullmatch(name)
    began = match["began"] if match else ""
    return datetime.strptime(began, _TIME).replace(tzinfo=UTC).timestamp()
