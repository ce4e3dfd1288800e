"""What the workers of `scalp grade` do: list photographs into shards, load a shard, grade and commit it.

Everything is left in files of names that are settled before, each written whole or not at all, so whatever is
done again writes the same file again:

    WORK/listed/GROUP/NNNN.parquet          photographs of a shard; at most `GROUP_SHARDS` shards a group
    WORK/started/GROUP/NNNN[.PPPPP].MARK    a model began it; with more marks than one, again
    WORK/graded/GROUP/NNNN.parquet          its result rows: committed
    WORK/graded/GROUP/NNNN.PPPPP.parquet    those of one piece of a tar, which is read in one pass
    WORK/ended/GROUP/NNNN.json              a tar was read to its end: how many pieces it has

A shard travels through Ray Data as one row, which is never divided: its photographs, their pixels, and the
seconds that it took so far, by stage.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jobs.images import Columns, LoadImages, fetch
from jobs.metrics import timed
from scalp_core import archives, codecs, drift, inventory, parquet, sources, storage
from scalp_core.bundle import BundleSpec
from scalp_core.errors import IMAGE_CODES, ImageError, UserError
from scalp_core.inventory import Root
from scalp_core.manifest import location_id
from scalp_core.preprocess import Preprocess
from scalp_core.results import result_table
from scalp_core.sources import Location

LISTED, STARTED, GRADED, ENDED = "listed", "started", "graded", "ended"
GROUP_SHARDS = 4096
INPUTS_KEY = b"scalp.inputs"
# A server that restarts is waited for; a job of hours must not end with it.
PATIENCE_S = 180
# Photographs that are fetched while those before them are decoded: what a loading task holds as files.
_PIECE = 64

Seconds = dict[str, float]


@dataclass
class Listed:
    """What a piece of a source holds.

    Args:
        group: of its shards; `group/NNNN` names one.
        photographs: rows of its listed shards.
        tars: shards that are one tar each, whose members are not counted yet.
        other_files: that are no photograph by their name.
        shadowed: members of archives that share their name with a later one.
    """

    group: str
    photographs: int = 0
    tars: int = 0
    other_files: int = 0
    shadowed: int = 0


class ListPhotographs:
    """Writes the shards of some roots of a source; returns a `Listed` for each group of shards.

    Args:
        work: folder of the run.
        shard_size: photographs of a shard.
    """

    def __init__(self, work: str, shard_size: int) -> None:
        self._work = work
        self._size = shard_size

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        with storage.patience(PATIENCE_S):
            roots = [Root(uri, whole) for uri, whole in zip(row["uris"], row["whole"], strict=True)]
            objects = chain.from_iterable(map(inventory.list_root, roots))
            return [vars(each) for each in write_groups(self._work, self._size, row["number"], objects)]


def write_groups(work: str, size: int, number: int, objects: Iterable[dict[str, Any]]) -> Iterator[Listed]:
    """Writes the photographs among listed objects as shards, in groups.

    Args:
        work: folder of the run.
        size: photographs of a shard.
        number: that tells these groups from others.
        objects: rows of `inventory.LISTED`.

    Yields:
        each group, and last what was no photograph.
    """
    counts = Listed(f"{number:04d}")
    tars: list[dict[str, Any]] = []
    rows = _photographs(objects, counts, tars)
    for place in count():
        group = f"{number:04d}-{place:06d}"
        if not (photographs := _write_group(work, group, size, islice(rows, size * GROUP_SHARDS))):
            break
        yield Listed(group, photographs=photographs)
    for place, some in enumerate(_batched(tars, GROUP_SHARDS)):
        group = f"{number:04d}-{place:06d}-tar"
        yield Listed(group, tars=_write_group(work, group, 1, iter(some)))
    yield counts


def _write_group(work: str, group: str, size: int, rows: Iterator[dict[str, Any]]) -> int:
    total = 0
    for place, some in enumerate(_batched(rows, size)):
        total += len(some)
        table = pa.Table.from_pylist(some, schema=inventory.LISTED)
        parquet.write(listed_file(work, f"{group}/{place:04d}"), table)
    return total


def _photographs(
    objects: Iterable[dict[str, Any]], counts: Listed, tars: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for row in objects:
        code, name = row["code"], row["member"] or row["uri"]
        if code == "shadowed_member":
            counts.shadowed += 1
        elif row.get("kind") or sources.is_photograph(name):
            # A table's label is of no concern here.
            yield row | ({"code": None, "error": None} if code == "bad_label" else {})
        elif archives.is_archive(name) and code:
            yield row  # it may hide some
        elif archives.is_stream(row["uri"]) and not row["member"]:
            tars.append(row)
        else:
            counts.other_files += 1


class LoadShard:
    """Fetches and decodes a shard, or a tar piece by piece; a photograph that cannot be read says why.

    Args:
        work: folder of the run.
        spec: how to decode.
        shard_size: photographs of a piece of a tar.
        fetches: requests at once.
    """

    def __init__(self, work: str, spec: Preprocess, shard_size: int, fetches: int) -> None:
        self._work = work
        self._size = shard_size
        self._fetches = fetches
        self._images = LoadImages(spec)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            shard = row["shard"]
            with storage.patience(PATIENCE_S):
                listed = parquet.read(listed_file(self._work, shard)).to_pylist()
                if row["tar"]:
                    yield from self._tar(shard, listed[0]["uri"], set(json.loads(row["done"])))
                else:
                    seconds: Seconds = {}
                    yield packed(shard, self._loaded(listed, seconds), seconds)

    def _loaded(self, rows: list[dict[str, Any]], seconds: Seconds) -> Columns:
        """Pieces are fetched while the ones before are decoded; what is waited for is `fetch`."""
        pieces = list(_batched(rows, _PIECE))
        with ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(self._fetched, pieces[0])
            decoded = []
            for number, piece in enumerate(pieces):
                with timed(seconds, "fetch"):
                    files = waiting.result()
                if number + 1 < len(pieces):
                    waiting = ahead.submit(self._fetched, pieces[number + 1])
                decoded.append(self._decoded(piece, files, seconds))
        return {name: np.concatenate([each[name] for each in decoded]) for name in decoded[0]}

    def _fetched(self, rows: list[dict[str, Any]]) -> list[bytes | ImageError]:
        wanted = [Location(row["uri"], row["member"]) for row in rows if not row["code"]]
        data = iter(fetch(wanted, self._fetches))
        return [ImageError(row["code"], row["error"]) if row["code"] else next(data) for row in rows]

    def _decoded(
        self, rows: list[dict[str, Any]], files: list[bytes | ImageError], seconds: Seconds
    ) -> Columns:
        columns = {
            "image_id": [location_id(Location(row["uri"], row["member"])) for row in rows],
            "uri": [row["uri"] for row in rows],
            "member": [row["member"] or "" for row in rows],
        }
        with timed(seconds, "decode"):
            batch = {name: np.array(each, object) for name, each in columns.items()}
            return self._images.decoded(batch, files)

    def _tar(self, shard: str, uri: str, done: set[int]) -> Iterator[pa.Table]:
        """A tar in one pass. What a run before committed is read over: a compressed one cannot be entered."""
        counts: Counter[str] = Counter()
        pieces, seconds = _batched(_tar_rows(uri, counts), self._size), Seconds()
        for number in count():
            with timed(seconds, "fetch"):
                piece = next(pieces, None)
            if piece is None:
                break
            counts["photographs"] += len(piece)
            if number not in done:
                rows, files = zip(*piece, strict=True)
                decoded = self._decoded(list(rows), list(files), seconds)
                yield packed(f"{shard}.{number:05d}", decoded, seconds)
                del decoded  # while the next piece is read
                seconds = Seconds()
        end = {"pieces": number, **{name: counts[name] for name in _COUNTED}}
        storage.write(ended_file(self._work, shard), json.dumps(end).encode())


_COUNTED = ("photographs", "other_files", "shadowed")
_TarRow = tuple[dict[str, Any], "bytes | ImageError"]
_NESTED = ImageError("nested_archive", IMAGE_CODES["nested_archive"])


def _tar_rows(uri: str, counts: Counter[str]) -> Iterator[_TarRow]:
    """Photographs of a tar, and a row for what may hide some: archives in it, its own damage."""
    seen: set[int] = set()
    try:
        for member, data in archives.stream(uri, codecs.MAX_BYTES, wanted=sources.is_photograph):
            if data is None and not archives.is_archive(member.name):
                counts["other_files"] += 1
            elif (name := hash(member.name)) in seen:
                counts["shadowed"] += 1
            else:
                seen.add(name)
                yield {"uri": uri, "member": member.name}, _NESTED if data is None else data
    except UserError as error:
        if storage.is_transient(error):  # what lies behind is to be had another time
            raise
        yield {"uri": uri, "member": None}, ImageError("bad_archive", str(error))


class Model(Protocol):
    """What grades pixels: `predictor.Predictor`, or what a bench puts in its place."""

    def logits(self, images: np.ndarray) -> np.ndarray: ...


class GradeShard:
    """Actor: grades a shard and commits its rows, whole or not at all, before it takes the next one.

    Args:
        work: folder of the run.
        spec: the bundle's contract.
        model_version: that signs the rows.
        model: makes the model, here.
        batch_size: photographs of one forward pass.
    """

    def __init__(self, work: str, spec: BundleSpec, model_version: str, model: Any, batch_size: int) -> None:
        self._work = work
        self._spec = spec
        self._version = model_version
        self._batch_size = batch_size
        self._model: Model = model()
        self._marks = ThreadPoolExecutor(1)  # beside the model
        self._refused: UserError | None = None
        self._free = time.monotonic()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self._refused:  # the run is ending; what is begun now would be lost with it
            raise self._refused
        waited = time.monotonic() - self._free
        for shard, rows, images, seconds in unpacked(batch, self._spec.preprocess.size):
            try:
                table = self._committed(shard, rows, images, seconds)
            except UserError as error:
                self._refused = error
                raise
            errors = Counter(code for code in rows["error_code"].tolist() if code)
            yield pa.table(
                {
                    "rows": [table.num_rows],
                    "failed": [errors.total()],
                    "errors": [json.dumps(errors)],
                    "seconds": [json.dumps(seconds | {"wait": waited})],
                }
            )
        self._free = time.monotonic()

    def _committed(self, shard: str, rows: Columns, images: np.ndarray, seconds: Seconds) -> pa.Table:
        with storage.patience(PATIENCE_S):
            mark = storage.join(self._work, STARTED, f"{shard}.{uuid.uuid4().hex[:8]}")
            marked = self._marks.submit(storage.write, mark, b"")
            with timed(seconds, "model"):
                table = self._graded(rows, images)
            with timed(seconds, "commit"):
                marked.result()
                parquet.write(graded_file(self._work, shard), table)
        return table

    def _graded(self, rows: Columns, images: np.ndarray) -> pa.Table:
        good = rows["error_code"] == ""
        logits = np.zeros((len(good), len(self._spec.grade_names)), np.float32)
        if good.any():
            logits[good] = self._logits(images if good.all() else images[good])
        table = result_table(rows, logits, self._spec, self._version)
        if self._spec.gates is None:
            return table
        inputs = drift.count(rows["statistics"][good], self._spec.gates)
        return table.replace_schema_metadata({INPUTS_KEY: inputs.model_dump_json()})

    def _logits(self, images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), self._batch_size)
        return np.concatenate(
            [self._model.logits(images[start : start + self._batch_size]) for start in starts]
        )


def listed_file(work: str, shard: str) -> str:
    return storage.join(work, LISTED, f"{shard}.parquet")


def graded_file(work: str, shard: str) -> str:
    return storage.join(work, GRADED, f"{shard}.parquet")


def ended_file(work: str, shard: str) -> str:
    return storage.join(work, ENDED, f"{shard}.json")


def packed(shard: str, rows: Columns, seconds: Seconds) -> pa.Table:
    """A shard as one row: name, columns but the pixels, the pixels, without a copy, and seconds."""
    images = np.ascontiguousarray(rows["image"])
    columns = {name: pa.array(values) for name, values in rows.items() if name not in ("image", "statistics")}
    statistics = rows["statistics"]
    columns["statistics"] = pa.FixedSizeListArray.from_arrays(statistics.ravel(), statistics.shape[1])
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table(
        {
            "shard": [shard],
            "rows": _one(sink.getvalue()),
            "pixels": _one(pa.py_buffer(images.reshape(-1))),
            "seconds": [json.dumps(seconds)],
        }
    )


def unpacked(batch: pa.Table, size: int) -> Iterator[tuple[str, Columns, np.ndarray, Seconds]]:
    """The inverse: name, columns, uint8 (N, size, size, 3), read-only, and seconds of each row."""
    for index in range(batch.num_rows):
        table = pa.ipc.open_stream(batch["rows"][index].as_buffer()).read_all()
        rows = {name: table[name].to_numpy() for name in table.column_names if name != "statistics"}
        statistics = table["statistics"].combine_chunks()
        rows["statistics"] = statistics.flatten().to_numpy().reshape(len(statistics), -1)
        pixels = np.frombuffer(batch["pixels"][index].as_buffer(), np.uint8)
        seconds = json.loads(batch["seconds"][index].as_py())
        yield str(batch["shard"][index]), rows, pixels.reshape(table.num_rows, size, size, 3), seconds


def _one(data: pa.Buffer) -> pa.Array:
    """An array of one binary value, without a copy."""
    ends = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, ends, data])


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
