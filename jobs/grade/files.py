"""Files of an unfinished grading run: listed, committed and ended shards.

Each file has a deterministic name and is written atomically, so a step that runs again writes the same file:

    SCRATCH/listing.json                        `Listing`; names the folder of the listed shards
    SCRATCH/listed-ID/GROUP.parquet             images of a group, a row group per shard (`ListedGroup`)
    SCRATCH/graded/GROUP/NNNN.parquet           result rows of a committed shard
    SCRATCH/graded/GROUP/NNNN.TAG.PPPPP.parquet result rows of one piece of a tar, which is read in one pass
    SCRATCH/ended/GROUP/NNNN.json               a tar was read to its end: `Ended`
    SCRATCH/sessions/*.json                     one file per session of the run

`TAG` is a hash of the version of a tar file: pieces of different versions are not mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scalp_core import storage
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import location_id
from scalp_core.datasets.scan import LISTED, batched
from scalp_core.errors import UserError
from scalp_core.storage import parquet

GRADED, ENDED = "graded", "ended"
GROUP_SHARDS, GROUP_TARS = 4096, 64
INPUTS_KEY = b"scalp.inputs"
# Jobs of hours must survive a restart of the storage server.
RETRY_TIMEOUT_S = 180
_SCHEMA_VERSION = 3


@dataclass
class Listed:
    """Group of shards `group/NNNN`, and counts of the files in its part of the sources.

    Args:
        group: Name of the group.
        photographs: Rows of its listed shards.
        tars: Shards that are one tar each, whose members are not counted yet.
        other_files: Files that are not images by their name.
        shadowed: Members of archives that share their name with a later one.
    """

    group: str
    photographs: int = 0
    tars: int = 0
    other_files: int = 0
    shadowed: int = 0


@dataclass(frozen=True)
class Listing:
    """Listing of the images that a run grades.

    Args:
        groups: Groups of shards; about one per few hundred thousand images.
        shard_size: Images per shard.
        folder: Name of the folder of the listed shards.
        other_files: As in `Listed`, of all sources.
        shadowed: As in `Listed`, of all sources.
        repeated: Rows that name an image of an earlier row.
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
        """Tars, which are one shard each."""
        return sum(group.tars for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": _SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any], uri: str) -> Listing:
        """Parse `content`, the inverse of `to_json`.

        Raises:
            UserError: Another version of scalp wrote it.
        """
        if (version := content.get("schema_version")) != _SCHEMA_VERSION:
            raise UserError(
                f"{uri} was written by another version of scalp (schema {version}, not {_SCHEMA_VERSION}); "
                "finish the run with that version, or choose another OUT"
            )
        known = {name: content[name] for name in cls.__dataclass_fields__}
        return cls(**known | {"groups": tuple(Listed(**group) for group in content["groups"])})


@dataclass(frozen=True)
class Ended:
    """Record of a tar that was read to its end.

    Args:
        tag: Tag of the version that was read, as in the names of its pieces.
        digests: Digest of the location ids of each piece, by `ids_digest`.
        dropped: Piece and row of members that a later member of the same name replaces.
        photographs: Result rows of the tar, without the dropped ones.
        other_files: Members that are not images by their name.
    """

    tag: str
    digests: list[str]
    dropped: list[list[int]]
    photographs: int
    other_files: int


def shard_names(group: Listed, shard_size: int) -> list[str]:
    """Names `GROUP/NNNN` of the shards of a group."""
    return [
        f"{group.group}/{place:04d}" for place in range(group.tars or -(-group.photographs // shard_size))
    ]


def group_of(shard: str) -> str:
    """Group of a shard `GROUP/NNNN`."""
    return shard.rsplit("/", 1)[0]


def place_of(shard: str) -> int:
    """Place of a shard `GROUP/NNNN` in its group."""
    return int(shard.rsplit("/", 1)[-1])


def listed_file(folder: str, group: str) -> str:
    """URI of the listed images of a group, in the folder of the listing."""
    return storage.join(folder, f"{group}.parquet")


def write_group(folder: str, group: str, size: int, rows: Iterable[dict[str, Any]]) -> int:
    """Write a group of shards of `size` images each, if there are rows; return their number."""
    chunks, total = batched(rows, size), 0
    first = next(chunks, None)
    if first is None:
        return 0

    def shards() -> Iterator[pa.RecordBatch]:
        nonlocal total
        for chunk in chain([first], chunks):
            total += len(chunk)
            yield pa.RecordBatch.from_pylist(chunk, schema=LISTED)

    parquet.write_batches(listed_file(folder, group), pa.RecordBatchReader.from_batches(LISTED, shards()))
    return total


def read_listed_rows(folder: str, group: Listed) -> Iterator[dict[str, Any]]:
    """Rows of all shards of a group, read shard by shard."""
    file = parquet.open_in_memory(listed_file(folder, group.group))
    for place in range(file.num_row_groups):
        yield from file.read_row_group(place).to_pylist()


def graded_file(work: str, shard: str) -> str:
    """URI of the result rows of a committed shard."""
    return storage.join(work, GRADED, f"{shard}.parquet")


def ended_file(work: str, shard: str) -> str:
    """URI of the record of a tar that was read to its end."""
    return storage.join(work, ENDED, f"{shard}.json")


def piece_name(shard: str, tag: str, number: int) -> str:
    """Name of a piece of a tar."""
    return f"{shard}.{tag}.{number:05d}"


def version_tag(version: str) -> str:
    """Hash the version of a file to 8 hexadecimal digits."""
    return hashlib.sha256(version.encode()).hexdigest()[:8]


def ids_digest(location_ids: Iterable[str]) -> str:
    """Digest of a sequence of location ids."""
    return hashlib.sha256(" ".join(location_ids).encode()).hexdigest()[:16]


def find_committed(work: str, group: Listed) -> dict[str, dict[str, set[int]]]:
    """Committed shards of a group: by name, the piece numbers of each version tag ("" and 0 if not a tar)."""
    pieces: dict[str, dict[str, set[int]]] = {}
    for name in storage.names_in(storage.join(work, GRADED, group.group)):
        shard, *piece = name.removesuffix(".parquet").split(".")
        tag, number = (piece[0], int(piece[1])) if piece else ("", 0)
        pieces.setdefault(f"{group.group}/{shard}", {}).setdefault(tag, set()).add(number)
    return pieces


class GroupState:
    """Shards of a group that a run or a retry has listed, committed, and (tars) read to their end.

    Args:
        work: Folder of the run or retry.
        listing: Its listing.
        group: Group of the listing.
    """

    def __init__(self, work: str, listing: Listing, group: Listed) -> None:
        self.group = group
        self.shards = shard_names(group, listing.shard_size)
        self.pieces = find_committed(work, group)
        names = storage.names_in(storage.join(work, ENDED, group.group)) if group.tars else set()
        ended = [f"{group.group}/{name.removesuffix('.json')}" for name in names]
        self.ends = {shard: Ended(**json.loads(storage.read(ended_file(work, shard)))) for shard in ended}
        self._listed_file = listed_file(storage.join(work, listing.folder), group.group)

    def is_whole(self, shard: str) -> bool:
        """Whether all rows of a shard are committed."""
        pieces = self.pieces.get(shard, {})
        if not self.group.tars:
            return bool(pieces)
        end = self.ends.get(shard)
        return end is not None and pieces.get(end.tag, set()) >= set(range(len(end.digests)))

    @property
    def pending(self) -> list[str]:
        """Shards whose rows are not all committed."""
        return [shard for shard in self.shards if not self.is_whole(shard)]

    @cached_property
    def _file(self) -> pq.ParquetFile:
        # Compressed, in memory: tens of MB at most.
        return parquet.open_in_memory(self._listed_file)

    def read_listed(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Read the listed images of one shard."""
        return self._file.read_row_group(place_of(shard), columns)

    def count_listed(self, shard: str) -> int:
        """Number of listed images of a shard."""
        return int(self._file.metadata.row_group(place_of(shard)).num_rows)

    def listed_ids(self, shard: str) -> list[str]:
        """Location ids of the listed images of a shard."""
        rows = self.read_listed(shard, ["uri", "member"]).to_pylist()
        return [location_id(Location(row["uri"], row["member"])) for row in rows]
