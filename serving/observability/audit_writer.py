"""Writer of the audit log: a thread appends to the hash chain, fsyncs in batches and removes old files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import UserError
from serving.observability.audit_chain import (
    NAME,
    find_segments,
    hash_line,
    read_after,
    read_end,
    read_segment,
)

_WAITING = 10_000  # lines in the queue; more are lost, which is logged and recorded in the chain
_CLOSING_S = 20  # for the last lines; a stopping replica has graceful_shutdown_seconds
_RETRY_S = 1  # after a failed write; a retry scans the folder
_LOCK = ".lock"
_TIME = "%Y%m%dT%H%M%S%f"
_HOUR = 3600
_DAY = 24 * _HOUR
_LOG_AGAIN_S = 60

_log = logging.getLogger("ray.serve")


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


class Writer:
    """Queue lines without blocking; a thread writes them.

    Args:
        settings: Settings with a folder.
        replica: Id of the replica; part of the file names.

    Raises:
        UserError: The folder cannot be created, or other users can read it.
    """

    def __init__(self, settings: AuditSettings, replica: str) -> None:
        self._files = _Files(settings, replica)
        self._sync_seconds = settings.sync_seconds
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._lost, self._unreported, self._logged = 0, 0, -math.inf
        self._is_closed, self._retry_at = False, -math.inf
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any]) -> None:
        """Queue a line; count it as lost if the queue is full."""
        if self._is_closed:
            self._lose("it was closed")
            return
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._lose("the disk does not keep up")

    def close(self) -> None:
        """Write and fsync all queued lines; log an error if any line was lost."""
        if self._is_closed:
            return
        self._is_closed = True
        deadline = time.monotonic() + _CLOSING_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSING_S)
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            for _ in range(max(1, self._queue.qsize())):
                self._lose("the disk hangs")
        if self._lost:
            _log.error("the audit log ended with %d lines lost", self._lost)

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._lost += 1
            self._unreported += 1
            now = time.monotonic()
            if now - self._logged < _LOG_AGAIN_S:
                return
            self._logged = now
            lost = self._lost
        _log.error("lines of the audit log were lost so far: %d; %s", lost, reason)

    def _run(self) -> None:
        due: float | None = None  # deadline of the next fsync
        while True:
            try:
                line = self._queue.get(timeout=None if due is None else max(0, due - time.monotonic()))
            except queue.Empty:
                self._sync()
                due = None
                continue
            if line is None:
                break
            self._write(line)
            if due is None:
                due = time.monotonic() + self._sync_seconds
            elif time.monotonic() >= due:
                self._sync()
                due = None
        self._write(None)
        self._sync()
        self._files.close()

    def _write(self, line: dict[str, Any] | None) -> None:
        if line is not None and time.monotonic() < self._retry_at:
            self._lose("it could not be written")
            return
        try:
            if unreported := self._unreported:
                self._files.append({"time": timestamp(), "lost": unreported})
                with self._lock:
                    self._unreported -= unreported
            if line is not None:
                self._files.append(line)
        except Exception as error:  # the thread must survive any error
            self._retry_at = time.monotonic() + _RETRY_S
            if line is not None:
                self._lose(f"it cannot be written ({error})")

    def _sync(self) -> None:
        try:
            self._files.sync()
        except OSError as error:
            _log.error("the last lines of the audit log may not be on the disk: %s", error)


def timestamp() -> str:
    """Current time in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Files:
    """Files of one writer, which continues the oldest chain that no other writer holds.

    A writer holds an flock on its file: the kernel releases it when the process is killed.
    """

    def __init__(self, settings: AuditSettings, replica: str) -> None:
        self._settings = settings
        self._folder = _open_folder(settings)
        self._replica = re.sub(r"[^\w.-]", "_", replica)
        self._path: Path | None = None  # the last file of the chain, open or not
        self._fd: int | None = None
        self._size, self._began = 0, 0.0
        self._seq = 0
        self._prev: str | None = None

    def append(self, entry: dict[str, Any]) -> None:
        """Append a line; begin the next file first if the current one is full, old or failed."""
        hours = (time.time() - self._began) / _HOUR
        is_full = self._size >= self._settings.max_bytes or hours >= self._settings.max_hours
        if self._fd is None or is_full:
            self._begin()
        self._append(entry)

    def sync(self) -> None:
        """Fsync the current file; after a failure the next line begins another file."""
        if self._fd is not None:
            try:
                os.fsync(self._fd)
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Close the current file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._fd is None:
            raise OSError("its file was closed")
        line = json.dumps({"seq": self._seq, "prev": self._prev, **entry}).encode()
        try:
            _write_all(self._fd, line + b"\n")
        except OSError:
            self.close()  # the head of the next file records its cut end
            raise
        self._seq, self._prev, self._size = self._seq + 1, hash_line(line), self._size + len(line) + 1

    def _begin(self) -> None:
        with _locked(self._folder), contextlib.ExitStack() as locks:
            before = self._path if self._fd is not None and self._path and self._path.exists() else None
            self.sync()
            self.close()
            self._create(before or self._adopt(locks))
            if self._settings.keep_days is not None:
                try:
                    self._remove_old(time.time() - self._settings.keep_days * _DAY)
                except OSError as error:
                    _log.warning("old files of the audit log stay: %s", error)

    def _create(self, before: Path | None) -> None:
        """Begin the next file of the chain, with a head that names the file before it."""
        began = time.time()
        stamp = datetime.fromtimestamp(began, UTC).strftime(_TIME)
        path = self._folder / f"audit-{stamp}Z-{self._replica}.jsonl"
        end = read_end(before) if before else None
        head = {"after": before.name if end and before else None, "torn": end.torn if end else None}
        self._seq, self._prev = (end.next_seq, end.last_hash) if end else (0, None)
        # The file is renamed after its head is written, so that a kill leaves no file without a head.
        hidden = path.with_name(f".{path.name}")
        self._fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = 0
            self._append({"time": timestamp(), "head": head})
            self.sync()
            hidden.rename(path)
        except OSError:
            self.close()
            hidden.unlink(missing_ok=True)
            raise
        self._path, self._began = path, began
        _sync_folder(self._folder)

    def _adopt(self, locks: contextlib.ExitStack) -> Path | None:
        """Find the last file of a chain whose writer has ended; locked until `locks` closes."""
        paths = find_segments(self._folder)
        followed = {read_after(path) for path in paths}
        for path in paths:
            if path.name in followed:
                continue
            with contextlib.suppress(OSError):  # of another user
                if locks.enter_context(_try_lock(path)) and read_end(path):
                    return path
        return None

    def _remove_old(self, limit: float) -> None:
        """Remove files that were closed before `limit`; the chain records their names first."""
        after = {path: read_after(path) for path in find_segments(self._folder)}
        followers = {name: path for path, name in after.items() if name}
        for path in list(after):
            follower = followers.get(path.name)
            closed = _beginning(follower) if follower else path.stat().st_mtime
            if path == self._path or closed > limit:
                continue
            with _try_lock(path) as is_free:
                segment = read_segment(path)
                if not is_free or segment.damage or (segment.torn and not follower):
                    _log.warning("the old audit file %s stays: it is in use or damaged", path.name)
                    continue
                del after[path]
                # Its records of removed files are kept while another file refers to them.
                names = [path.name, *sorted(segment.removed & set(after.values()))]
                self._append({"time": timestamp(), "removed": names})
                self.sync()
                path.unlink(missing_ok=True)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other writers that begin, adopt or remove files."""
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Try to lock a file; yields whether no writer holds it."""
    fd = os.open(path, os.O_RDWR)  # NFS locks files that are open for writing only
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        yield is_free
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beginning(path: Path) -> float:
    match = NAME.fullmatch(path.name)
    return datetime.strptime(match["began"] if match else "", _TIME).replace(tzinfo=UTC).timestamp()


def _open_folder(settings: AuditSettings) -> Path:
    """Create the folder if it is missing, and check that other users cannot read it."""
    folder = Path(settings.folder or "").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"the audit log cannot be written to {folder}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"other users can read the audit log in {folder}; run: chmod 700 {folder}")
    return folder
