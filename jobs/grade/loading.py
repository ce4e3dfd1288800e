"""Loading tasks of `scalp grade`: fetch and decode a shard, or a tar piece by piece.

An image that cannot be read is a row with its error. After a shard has crashed its process three times, its
images are decoded in a child process, so that a crashing decoder costs one row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from jobs.common.console import timed
from jobs.common.images import Columns, LoadImages, fetch
from jobs.common.isolate import MOST_TRIES, Isolation
from jobs.grade.files import (
    RETRY_TIMEOUT_S,
    Ended,
    ended_file,
    ids_digest,
    piece_name,
    version_tag,
)
from jobs.grade.shards import LoadedShard
from scalp_core import archives, storage
from scalp_core.datasets import locations
from scalp_core.datasets.locations import Location, location_of
from scalp_core.datasets.manifest import location_id
from scalp_core.datasets.scan import batched
from scalp_core.errors import IMAGE_CODES, ImageError, UserError
from scalp_core.images import codecs
from scalp_core.images.preprocess import Preprocess
from scalp_core.storage.lease import Guard

# Images that are fetched while the previous ones are decoded; bounds the files in memory of a task.
_PIECE = 64

logger = logging.getLogger(__name__)

Seconds = dict[str, float]
File = bytes | ImageError
TarRow = tuple[dict[str, Any], File]


@dataclass(frozen=True)
class LoadShard:
    """Task: fetch and decode a shard, or a tar piece by piece.

    Args:
        work: Folder of the run.
        guard: Guard of the run's lease; a run that lost it loads no more shards.
        spec: Preprocessing of the images.
        shard_size: Images per piece of a tar.
        fetches: Concurrent requests.
        within: Real paths of local sources; a file that a link leads out of them is refused, also if the link
            was made after listing. Empty: no restriction.
    """

    work: str
    guard: Guard
    spec: Preprocess
    shard_size: int
    fetches: int
    within: tuple[str, ...] = ()

    def __call__(self, item: dict[str, Any], tries: int) -> Iterator[LoadedShard]:
        """Load an item of `grade_shards`; `tries`: how often it ended its process before."""
        shard, listed, is_isolated = item["shard"], item["listed"].to_pylist(), tries >= MOST_TRIES
        with storage.retry_timeout(RETRY_TIMEOUT_S), Isolation() if is_isolated else nullcontext() as child:
            self.guard.check()
            if child:
                logger.warning("%s: its process crashed %d times; decoding in a child process", shard, tries)
            if item["tar"]:
                yield from self._load_tar(shard, listed[0]["uri"], item["done"], child)
            else:
                yield self._load_shard(shard, listed, child)

    def _load_shard(self, shard: str, rows: list[dict[str, Any]], child: Isolation | None) -> LoadedShard:
        """Fetch each piece while the previous one is decoded; `seconds["fetch"]` is the time waited."""
        pieces, seconds = list(batched(rows, _PIECE)), Seconds()
        changed = _changed_archives(rows)
        with ThreadPoolExecutor(1) as ahead:
            fetched = ahead.submit(self._fetch, pieces[0], changed)
            decoded = []
            for number, piece in enumerate(pieces):
                with timed(seconds, "fetch"):
                    files = fetched.result()
                if number + 1 < len(pieces):
                    fetched = ahead.submit(self._fetch, pieces[number + 1], changed)
                with timed(seconds, "decode"):
                    decoded.append(self._decode(_columns(piece), files, child))
        return LoadedShard(shard, _concatenate(decoded), seconds)

    def _decode(self, rows: Columns, files: list[File], child: Isolation | None) -> Columns:
        load = LoadImages(self.spec)
        if child is None:
            return load.decoded(rows, files)
        decoded = []
        for index, file in enumerate(files):
            row = {name: values[index : index + 1] for name, values in rows.items()}
            try:
                decoded.append(child.call(load.decoded, row, [file]))
            except ImageError as error:
                decoded.append(load.decoded(row, [error]))
        return _concatenate(decoded)

    def _fetch(self, rows: list[dict[str, Any]], changed: dict[str, ImageError]) -> list[File]:
        refused = [
            ImageError(row["code"], row["error"])
            if row["code"]
            else changed.get(row["uri"]) or self._check_outside(row["uri"])
            for row in rows
        ]
        wanted = [row for row, error in zip(rows, refused, strict=True) if error is None]
        data = iter(fetch([location_of(row) for row in wanted], self.fetches))
        return [next(data) if error is None else error for error in refused]

    def _check_outside(self, uri: str) -> ImageError | None:
        """Error of a file outside of the local sources."""
        if not self.within or storage.is_s3(uri):
            return None
        if any(storage.is_within(uri, folder) for folder in self.within):
            return None
        return _error("outside_link")

    # --- tars -----------------------------------------------------------------------------------------------

    def _load_tar(
        self, shard: str, uri: str, done: dict[str, set[int]], child: Isolation | None
    ) -> Iterator[LoadedShard]:
        """Load a tar in one pass.

        Pieces that an earlier session committed are read and skipped: a compressed tar has no random access.
        If the tar changed since then, it has another tag, and those pieces are not used.
        """
        rows = TarRows(uri, _version(uri), self._check_outside(uri))
        tag = version_tag(rows.version)
        if done and tag not in done:
            logger.warning("%s changed since a part of it was graded; it is graded again", uri)
        pieces, seconds, digests = batched(rows, self.shard_size), Seconds(), []
        for number in count():
            with timed(seconds, "fetch"):
                piece = next(pieces, None)
            if piece is None:
                break
            columns = _columns([row for row, _ in piece])
            digests.append(ids_digest(columns["location_id"]))
            if number not in done.get(tag, ()):
                with timed(seconds, "decode"):
                    decoded = self._decode(columns, [data for _, data in piece], child)
                yield LoadedShard(piece_name(shard, tag, number), decoded, seconds)
                del decoded  # frees memory while the next piece is read
                seconds = Seconds()
        dropped = [list(divmod(place, self.shard_size)) for place in sorted(rows.dropped)]
        end = Ended(tag, digests, dropped, rows.count - len(dropped), rows.other_files)
        storage.write(ended_file(self.work, shard), json.dumps(asdict(end)).encode())


class TarRows:
    """Iterate over the images of a tar in one pass; nested archives and damage are rows with an error.

    Of members that share a name the last one counts, as for `tar x`: the places of the others are `dropped`.
    After all rows are read, `count` and `other_files` are those of the whole tar. If its version is not
    `version` then, the last row is an error. If it is `refused`, that error is its only row.
    """

    def __init__(self, uri: str, version: str, refused: ImageError | None = None) -> None:
        self._uri = uri
        self.version = version
        self._refused = refused
        self.count = 0
        self.other_files = 0
        self.dropped: list[int] = []

    def __iter__(self) -> Iterator[TarRow]:
        for row in self._rows():
            self.count += 1
            yield row

    def _rows(self) -> Iterator[TarRow]:
        if self._refused:
            yield _archive_row(self._uri, self._refused)
            return
        places: dict[int, int] = {}
        try:
            for member, data in archives.stream_members(
                self._uri, codecs.MAX_BYTES, wanted=locations.is_image_name
            ):
                if data is None and not archives.is_archive(member.name):
                    self.other_files += 1
                    continue
                name = hash(member.name)
                if name in places:
                    self.dropped.append(places[name])
                places[name] = self.count
                yield (
                    {"uri": self._uri, "member": member.name},
                    _error("nested_archive") if data is None else data,
                )
            if _version(self._uri) != self.version:
                yield _archive_row(self._uri, ImageError("changed", "it changed while it was read"))
        except UserError as error:
            if storage.is_transient(error):  # a retry can read the rest
                raise
            yield _archive_row(self._uri, ImageError("bad_archive", str(error)))


def _archive_row(uri: str, error: ImageError) -> TarRow:
    return {"uri": uri, "member": None}, error


def _error(code: str) -> ImageError:
    return ImageError(code, IMAGE_CODES[code])


def _version(uri: str) -> str:
    """Version of a file, as in listings; empty if there is no such file."""
    try:
        return next(file.version for file in storage.walk(uri))
    except UserError as error:
        if storage.is_transient(error):
            raise
        return ""


def _changed_archives(rows: list[dict[str, Any]]) -> dict[str, ImageError]:
    """Errors, by uri, of archives that changed since they were listed; one request per archive."""
    listed = {row["uri"]: row["version"] for row in rows if row["member"] and row["version"]}
    changed = [uri for uri, version in listed.items() if _version(uri) not in (version, "")]
    for uri in changed:
        logger.warning("%s changed since it was listed", uri)
    message = "the archive changed since it was listed; --retry-failed reads it as it is now"
    return {uri: ImageError("changed", message) for uri in changed}


def _columns(rows: list[dict[str, Any]]) -> Columns:
    columns = {
        "location_id": [location_id(Location(row["uri"], row["member"])) for row in rows],
        "uri": [row["uri"] for row in rows],
        "member": [row["member"] or "" for row in rows],
    }
    return {name: np.array(values, object) for name, values in columns.items()}


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
