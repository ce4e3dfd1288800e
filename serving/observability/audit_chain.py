"""Append to, read and verify the hash chain of the audit log.

All replicas of a node append to one chain. Each line has `seq`, one more than the line before it, and `prev`,
the SHA-256 of that line's bytes, also from file to file. A line with `removed` says where the chain begins
since retention removed files; a `lost` line says how many lines could not be written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from scalp_core import storage
from scalp_core.errors import UserError

_NAME = re.compile(r"audit-\d{8}T\d{12}Z\.jsonl")
_DAY_DIGITS = slice(6, 14)  # of a name
_LOCK = ".lock"
_TAIL_BYTES = 2**16  # more than a line has
_DAY_S = 24 * 3600


class _Line(BaseModel):
    """Fields of a line that belong to the chain."""

    seq: int
    prev: str | None
    lost: int = 0
    removed: int = 0  # `seq` of the first line that retention left


def timestamp() -> str:
    """Current time in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Chain:
    """Append lines to the log in a folder; a file ends at `max_bytes`, or with its day in UTC."""

    def __init__(self, folder: Path, max_bytes: int, keep_days: float | None) -> None:
        self._folder = folder
        self._max_bytes, self._keep_days = max_bytes, keep_days

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Append lines and fsync them, all or none."""
        with _locked(self._folder):
            paths = find_files(self._folder)
            seq, prev = _read_end(paths)
            today = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
            path = paths[-1] if paths else None
            if path is None or path.name[_DAY_DIGITS] != today[:8] or path.stat().st_size >= self._max_bytes:
                path = self._folder / f"audit-{today}Z.jsonl"
                if removed := self._remove_old(paths, seq):
                    entries = [removed, *entries]
            data = b""
            for entry in entries:
                line = json.dumps({"seq": seq, "prev": prev, **entry}).encode()
                seq, prev, data = seq + 1, _hash(line), data + line + b"\n"
            _write(path, data)

    def _remove_old(self, paths: list[Path], seq: int) -> dict[str, Any] | None:
        """Remove files that were last written `keep_days` ago; the entry that says so."""
        if self._keep_days is None:
            return None
        limit = time.time() - self._keep_days * _DAY_S
        kept = next((i for i, path in enumerate(paths) if path.stat().st_mtime >= limit), len(paths))
        if not kept:
            return None
        for path in paths[:kept]:
            path.unlink()
        first = _first_line(paths[kept]) if kept < len(paths) else None
        return {"time": timestamp(), "removed": first.seq if first else seq}


def find_files(folder: Path) -> list[Path]:
    """Files of a log, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


@dataclass
class Verdict:
    """Result of the verification of a folder.

    `head` is the SHA-256 of the last line. `torn` counts lines that a kill cut; `damage` lists the broken
    places, oldest first.
    """

    files: int = 0
    lines: int = 0
    torn: int = 0
    lost: int = 0
    head: str | None = None
    damage: list[str] = field(default_factory=list)


def verify(folder: Path, heads: Iterable[str] = ()) -> Verdict:
    """Verify the chain in a folder.

    Args:
        folder: Folder of the log, or a copy of it.
        heads: SHA-256 of lines that the log must contain, from `head` of earlier verdicts.

    Raises:
        UserError: There is no log, or it is not readable.
    """
    found, missing = Verdict(), set(heads)
    begins, seq, removed = 0, 0, 0
    try:
        for path in find_files(folder):
            found.files += 1
            with path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    line = _parse(raw)
                    if line is None:
                        found.torn += 1  # the next line names the hash of the line before it
                        continue
                    if not found.lines:
                        begins = line.seq
                    elif line.prev != found.head or line.seq != seq:
                        found.damage.append(
                            f"{path.name}: line {number} does not continue the line before it, which was "
                            "changed or removed"
                        )
                    found.lines += 1
                    found.lost += line.lost
                    found.head, seq = _hash(raw[:-1]), line.seq + 1
                    removed = max(removed, line.removed)
                    missing.discard(found.head)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {storage.advice(error)}") from error
    if not found.files:
        raise UserError(f"{folder} holds no audit log; give the folder of scalp serve --audit")
    if begins > removed:
        found.damage.insert(0, f"the first {begins} lines are missing; retention removed {removed}")
    if found.lost:
        found.damage.append(f"{found.lost} lines were lost before they were written")
    found.damage += [f"no line has the hash {head}: the end is missing or was rewritten" for head in missing]
    return found


def _hash(line: bytes) -> str:
    """SHA-256 of a line without its newline, hex."""
    return hashlib.sha256(line).hexdigest()


def _parse(raw: bytes) -> _Line | None:
    try:
        return _Line.model_validate_json(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None


def _first_line(path: Path) -> _Line | None:
    with path.open("rb") as file:
        return next((line for raw in file if (line := _parse(raw))), None)


def _read_end(paths: list[Path]) -> tuple[int, str | None]:
    """`seq` and `prev` of the next line."""
    for path in reversed(paths):
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for raw in reversed(file.read().splitlines(keepends=True)):
                if line := _parse(raw):
                    return line.seq + 1, _hash(raw[:-1])
    return 0, None


def _write(path: Path, data: bytes) -> None:
    """Append to a file and fsync it; a full disk leaves no piece of the data."""
    is_new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b" cut\n" + data  # ends the piece that a kill left
        try:
            while data:
                data = data[os.write(fd, data) :]
        except OSError:
            os.ftruncate(fd, size)
            raise
        os.fsync(fd)
    finally:
        os.close(fd)
    if is_new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the log; the kernel releases the lock of a killed process."""
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
