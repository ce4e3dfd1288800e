"""Writer of the audit log: a thread appends the lines of a replica in batches."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import stat
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from scalp_core import storage
from scalp_core.errors import UserError
from serving.observability.audit_chain import Chain, timestamp

_WAITING = 10_000  # lines in the queue; more are lost, which is logged and recorded in the chain
_BATCH_S = 0.2  # in which lines are collected, so that they share an fsync
_CLOSING_S = 20  # for the last lines; a stopping replica has 40 s at least
_LOG_AGAIN_S = 60

_log = logging.getLogger("ray.serve")


class AuditSettings(BaseModel):
    """Settings of the audit log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str | None = Field(
        None, description="directory on each node, closed to other users; None turns the log off"
    )
    max_bytes: int = Field(
        64 * 2**20, ge=1, description="size of one file, after which the next one begins; or on the next day"
    )
    keep_days: float | None = Field(
        None, gt=0, description="age in days at which files are removed; None keeps all"
    )
    computed: bool = Field(
        False,
        description="whether each line of a graded image needs a forward pass in its request; bars cache_mib",
    )


class Writer:
    """Queue lines without blocking; a thread writes them.

    Args:
        settings: Settings with a folder.

    Raises:
        UserError: The folder cannot be created, or other users can read it.
    """

    def __init__(self, settings: AuditSettings) -> None:
        self._chain = Chain(_open_folder(settings), settings.max_bytes, settings.keep_days)
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._lost, self._unrecorded, self._logged = 0, 0, -math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Queue a line; count it as lost if the queue is full."""
        if self._closing.is_set():
            self._lose("it was closed")
            return
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._lose("the disk does not keep up")

    def close(self) -> None:
        """Write all queued lines; log an error if any line was lost."""
        self._closing.set()
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            self._lose("the disk hangs", max(1, self._queue.qsize()))
        if self._lost:
            _log.error("the audit log ended with %d lines lost", self._lost)

    def _lose(self, reason: str, lines: int = 1) -> None:
        with self._lock:
            self._lost += lines
            self._unrecorded += lines
            now = time.monotonic()
            if now - self._logged < _LOG_AGAIN_S:
                return
            self._logged = now
        _log.error("lines of the audit log were lost so far: %d; %s", self._lost, reason)

    def _run(self) -> None:
        while not self._closing.wait(_BATCH_S):
            self._write()
        self._write()

    def _write(self) -> None:
        """Write all queued lines, after the number of lost ones."""
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._queue.get_nowait())
        lost = self._unrecorded
        record = [{"time": timestamp(), "lost": lost}] if lost else []
        if not lines and not record:
            return
        try:
            self._chain.append([*record, *lines])
        except Exception as error:  # the thread must survive any error
            if lines:
                self._lose(f"it cannot be written ({error})", len(lines))
        else:
            with self._lock:
                self._unrecorded -= lost


def _open_folder(settings: AuditSettings) -> Path:
    """Create the folder if it is missing, and check that other users cannot read it."""
    folder = storage.local_folder(settings.folder or "", "audit log")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"the audit log cannot be written to {folder}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"other users can read the audit log in {folder}; run: chmod 700 {folder}")
    return folder
