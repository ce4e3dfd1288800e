"""Files of a grading run that is not finished: what is listed, begun, graded and read to its end.

Every file has a deterministic name and is written atomically, so a step that runs again writes the same file:

    SCRATCH/listing.json                        what there is to grade; names the folder of its shards
    SCRATCH/listed-ID/GROUP/NNNN.parquet        images of a shard; at most `GROUP_SHARDS` shards per group
    SCRATCH/started/GROUP/NNNN[.TAG.PPPPP].MARK a model began it; with more marks than one, again
    SCRATCH/graded/GROUP/NNNN.parquet           its result rows: committed
    SCRATCH/graded/GROUP/NNNN.TAG.PPPPP.parquet those of one piece of a tar, which is read in one pass
    SCRATCH/ended/GROUP/NNNN.json               a tar was read to its end: `Ended`
    SCRATCH/sessions/*.json                     one file per time that the run ran

`TAG` stands for the version of a tar's file: pieces of another version are never mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scalp_core import storage
from scalp_core.errors import UserError

STARTED, GRADED, ENDED = "started", "graded", "ended"
GROUP_SHARDS = 4096
INPUTS_KEY = b"scalp.inputs"
# A job of hours outlives a server's restart.
RETRY_TIMEOUT_S = 180
_SCHEMA_VERSION = 2


@dataclass
class Listed:
    """What a piece of a source holds.

    Args:
        group: name of its group of shards; `group/NNNN` names one.
        photographs: rows of its listed shards.
        tars: shards that are one tar each, whose members are not counted yet.
        other_files: files that are not images by their name.
        shadowed: members of archives that share their name with a later one.
    """

    group: str
    photographs: int = 0
    tars: int = 0
    other_files: int = 0
    shadowed: int = 0


@dataclass(frozen=True)
class Listing:
    """What a run grades.

    Args:
        groups: groups of shards; one more for every few hundred thousand images.
        shard_size: images per shard.
        folder: name of the folder that holds the listed shards.
        other_files: files that are not images by their name.
        shadowed: members of archives that share their name with a later one.
        repeated: images that the sources name again.
    """

    groups: tuple[Listed, ...]
    shard_size: int
    folder: str
    other_files: int = 0
    shadowed: int = 0
    repeated: int = 0

    @property
    def photographs(self) -> int:
        """Rows of the listed shards; images in tars are counted when they are read."""
        return sum(group.photographs for group in self.groups)

    @property
    def tars(self) -> int:
        return sum(group.tars for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": _SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any], uri: str) -> Listing:
        """The inverse of `to_json`.

        Raises:
            UserError: another version of scalp wrote it.
        """
        if (found := content.get("schema_version")) != _SCHEMA_VERSION:
            raise UserError(
                f"{uri} was written by another version of scalp (schema {found}, not {_SCHEMA_VERSION}); "
                "finish the run with that version, or choose another OUT"
            )
        known = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"groups": tuple(Listed(**group) for group in content["groups"])})


@dataclass(frozen=True)
class Ended:
    """A tar that was read to its end.

    Args:
        tag: of the version that was read; its pieces have it in their names.
        digests: of the location ids of each piece, by `ids_digest`.
        dropped: piece and row of members that a later member of the same name replaces.
        photographs: result rows that the tar has, without those.
        other_files: members that are not images by their name.
    """

    tag: str
    digests: list[str]
    dropped: list[list[int]]
    photographs: int
    other_files: int


def shard_names(group: Listed, shard_size: int) -> list[str]:
    """`GROUP/NNNN` of each shard of a group."""
    return [
        f"{group.group}/{place:04d}" for place in range(group.tars or -(-group.photographs // shard_size))
    ]


def listed_file(folder: str, shard: str) -> str:
    """Listed images of a shard; `folder` is that of the listing."""
    return storage.join(folder, f"{shard}.parquet")


def graded_file(work: str, shard: str) -> str:
    return storage.join(work, GRADED, f"{shard}.parquet")


def ended_file(work: str, shard: str) -> str:
    return storage.join(work, ENDED, f"{shard}.json")


def piece_name(shard: str, tag: str, number: int) -> str:
    """Name of a piece of a tar."""
    return f"{shard}.{tag}.{number:05d}"


def version_tag(version: str) -> str:
    """A short name for the version of a file."""
    return hashlib.sha256(version.encode()).hexdigest()[:8]


def ids_digest(location_ids: Iterable[str]) -> str:
    """Names a sequence of location ids."""
    return hashlib.sha256(" ".join(location_ids).encode()).hexdigest()[:16]


def committed(work: str, group: Listed) -> dict[str, dict[str, set[int]]]:
    """Shards of a group that have result rows; of a tar, which pieces of which version."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in storage.names_in(storage.join(work, GRADED, group.group)):
        shard, *piece = name.removesuffix(".parquet").split(".")
        tag, number = (piece[0], int(piece[1])) if piece else ("", 0)
        found.setdefault(f"{group.group}/{shard}", {}).setdefault(tag, set()).add(number)
    return found


def ended(work: str, group: Listed) -> dict[str, Ended]:
    """Tars of a group that were read to their end."""
    names = storage.names_in(storage.join(work, ENDED, group.group)) if group.tars else set()
    shards = {f"{group.group}/{name.removesuffix('.json')}" for name in names}
    return {shard: Ended(**json.loads(storage.read(ended_file(work, shard)))) for shard in shards}


def begun(work: str, group: Listed) -> Counter[str]:
    """How often a model began each shard of a group, or piece of a tar, by its name."""
    names = storage.names_in(storage.join(work, STARTED, group.group))
    return Counter(f"{group.group}/{name.rsplit('.', 1)[0]}" for name in names)


def is_whole(group: Listed, pieces: dict[str, set[int]], end: Ended | None) -> bool:
    """Whether every row of a shard is committed.

    Args:
        group: of the shard.
        pieces: committed ones, as `committed` gives them.
        end: of a tar, None until it was read to its end.
    """
    if not group.tars:
        return bool(pieces)
    return end is not None and pieces.get(end.tag, set()) >= set(range(len(end.digests)))
