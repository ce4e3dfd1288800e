"""Read and verify the hash chain of the audit log.

Each line has `seq`, one more than the line before it, and `prev`, the SHA-256 of that line's bytes. The
first line of a file has `head`, which names the file that the chain continues from (`after`) and, if a kill
or a full disk cut that file within a line, the size and SHA-256 of the cut piece (`torn`). A `removed` line
names files that retention removed; a `lost` line says how many lines could not be written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalp_core.errors import UserError

NAME = re.compile(r"audit-(?P<began>\d{8}T\d{12})Z-.+\.jsonl")
_TAIL_BYTES = 2**20  # more than a line has


def hash_line(line: bytes) -> str:
    """SHA-256 of a line without its newline, hex."""
    return hashlib.sha256(line).hexdigest()


@dataclass
class Segment:
    """Content of one file of the log, and its place in the chain."""

    path: Path
    after: str | None = None  # the file before it in the chain
    seals: dict[str, Any] | None = None  # the cut piece of `after`, according to the head
    begins_at: tuple[int, str | None] = (0, None)  # seq and prev of the first line
    lines: int = 0
    next_seq: int = 0
    last_hash: str | None = None
    torn: dict[str, Any] | None = None  # the cut piece at the end of this file
    lost: int = 0
    removed: set[str] = field(default_factory=set)
    damage: str | None = None  # first broken place

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name


def find_segments(folder: Path) -> list[Path]:
    """Files of a log, oldest first."""
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def read_after(path: Path) -> str | None:
    """Name of the file before `path` in its chain, from its first line; None if not readable."""
    try:
        with path.open("rb") as file:
            head = (_parse(file.readline()) or {}).get("head")
    except OSError:
        return None
    after = head.get("after") if isinstance(head, dict) else None
    return after if isinstance(after, str) else None


def read_segment(path: Path, wanted: set[str] | None = None) -> Segment:
    """Read a whole file and check each line against the line before it.

    Args:
        wanted: SHA-256 of lines to find; found hashes are removed from the set.
    """
    segment = Segment(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                segment.torn = _torn(raw)
                break
            line = raw[:-1]
            entry = _parse(line)
            segment.damage = segment.damage or _check(segment, number, entry)
            segment.lines = number
            segment.last_hash = hash_line(line)
            if wanted:
                wanted.discard(segment.last_hash)
            if entry is not None:
                _take(segment, entry)
    if not segment.lines:
        segment.damage = "its first line is missing"
    return segment


@dataclass(frozen=True)
class End:
    """End of a file, as recorded in the head of the next file."""

    next_seq: int
    last_hash: str
    torn: dict[str, Any] | None


def read_end(path: Path) -> End | None:
    """Read the end of a file; None if its last complete line is not a line of an audit log."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
        file.seek(start)
        *lines, cut = file.read().split(b"\n")
    entry = _parse(lines[-1]) if lines else None
    return None if entry is None else End(entry["seq"] + 1, hash_line(lines[-1]), _torn(cut))


def _torn(cut: bytes) -> dict[str, Any] | None:
    return {"bytes": len(cut), "sha256": hash_line(cut)} if cut else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("seq"), int) else None


def _check(segment: Segment, number: int, entry: dict[str, Any] | None) -> str | None:
    if entry is None:
        return f"line {number} is not a line of an audit log"
    if number == 1:
        head = entry.get("head")
        if not isinstance(head, dict):
            return "line 1 is not a head: lines before it are missing"
        segment.after, segment.seals = head.get("after"), head.get("torn")
        segment.begins_at = (entry["seq"], entry.get("prev"))
        return None
    if entry["seq"] != segment.next_seq:
        return f"line {number} has seq {entry['seq']}; {segment.next_seq} follows the line before it"
    if entry.get("prev") != segment.last_hash:
        return f"line {number - 1} was changed: line {number} names another hash"
    return None


def _take(segment: Segment, entry: dict[str, Any]) -> None:
    segment.next_seq = entry["seq"] + 1
    if isinstance(entry.get("lost"), int):
        segment.lost += entry["lost"]
    if isinstance(entry.get("removed"), list):
        segment.removed.update(str(name) for name in entry["removed"])


@dataclass(frozen=True)
class Verdict:
    """Result of the verification of a folder.

    `heads` is the SHA-256 of the last line of each chain, by its last file. `torn` counts cut lines: they are
    damage only at the end of a chain; `damage` lists the first broken place of each file, oldest first.
    """

    files: int
    chains: int
    lines: int
    torn: int
    lost: int
    removed: int
    heads: dict[str, str | None]
    damage: list[str]


def verify(folder: Path, heads: Iterable[str] = ()) -> Verdict:
    """Verify all chains in a folder.

    Args:
        folder: Folder of the log, or a copy of it.
        heads: SHA-256 of lines that the log must contain, from `heads` of an earlier `Verdict`.

    Raises:
        UserError: There is no log, or it is not readable.
    """
    wanted = set(heads)
    try:
        segments = [read_segment(path, wanted) for path in find_segments(folder)]
    except OSError as error:
        raise UserError(f"{error.filename or folder} is not readable: {error.strerror}") from error
    if not segments:
        raise UserError(f"{folder} holds no audit log; give the folder of scalp serve --audit")
    by_name = {segment.name: segment for segment in segments}
    removed = {name for segment in segments for name in segment.removed}
    followed: set[str] = set()
    damage = []
    for segment in segments:
        places = [segment.damage, _link(segment, by_name, removed, segment.after in followed)]
        if segment.lost:
            places.append(f"{segment.lost} lines were lost before they were written")
        damage += [f"{segment.name}: {place}" for place in places if place]
        if segment.after:
            followed.add(segment.after)
    last = [segment for segment in segments if segment.name not in followed]
    damage += [
        f"{segment.name}: ends within a line, by a kill or a cut, and no later file names it"
        for segment in last
        if segment.torn
    ]
    damage += [
        f"no line has the hash {head}: the end of a chain is missing or was rewritten" for head in wanted
    ]
    return Verdict(
        files=len(segments),
        chains=sum(segment.after not in by_name for segment in segments),
        lines=sum(segment.lines for segment in segments),
        torn=sum(segment.torn is not None for segment in segments),
        lost=sum(segment.lost for segment in segments),
        removed=len(removed - by_name.keys()),
        heads={segment.name: segment.last_hash for segment in last},
        damage=damage,
    )


def _link(segment: Segment, by_name: dict[str, Segment], removed: set[str], is_forked: bool) -> str | None:
    """Damage between a file and the file before it; None if the link is intact."""
    if segment.damage and not segment.begins_at[1] and segment.after is None:
        return None  # its head is unreadable or it begins a chain
    if segment.after is None:
        return (
            None if segment.begins_at == (0, None) else "it begins within a chain but names no file before it"
        )
    before = by_name.get(segment.after)
    if before is None:
        return None if segment.after in removed else f"{segment.after} before it is missing"
    if is_forked:
        return f"another file continues {segment.after} too"
    if segment.begins_at != (before.next_seq, before.last_hash) or segment.seals != before.torn:
        return f"{segment.after} before it does not end where this file continues"
    return None
