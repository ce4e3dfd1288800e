"""Third step of `scalp grade`: merge the rows of shards into few large files, and account for each image.

Each file is written atomically under a deterministic name, so gathering again writes the same files.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.common.console import progress_bar
from jobs.common.executor import Executor
from jobs.grade.files import (
    INPUTS_KEY,
    RETRY_TIMEOUT_S,
    Ended,
    Listed,
    Listing,
    count_starts,
    find_committed,
    graded_file,
    ids_digest,
    is_whole,
    listed_file,
    piece_name,
    read_ended,
    shard_names,
)
from scalp_core import storage
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import location_id
from scalp_core.results import drift
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import open_duckdb
from scalp_core.storage.lease import Guard

ROWS_PER_PART = 250_000
_ROWS_PER_GROUP = 25_000

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """Totals of result rows.

    Args:
        rows: Result rows.
        unaccounted: Images without a row, with the row of another image, or with several rows.
        again: Images of shards that a model started again: an upper bound of repeated work.
        other_files: Members of tars that are not images by their name.
        shadowed: Members of tars that share their name with a later one.
        referred: Rows that are referred.
        by_grade: Rows by grade name.
        by_error: Failed rows by error code.
        by_reason: Referred rows by reason.
        inputs: Image statistics, for the drift check.
    """

    rows: int = 0
    unaccounted: int = 0
    again: int = 0
    other_files: int = 0
    shadowed: int = 0
    referred: int = 0
    by_grade: Counter[str] = field(default_factory=Counter)
    by_error: Counter[str] = field(default_factory=Counter)
    by_reason: Counter[str] = field(default_factory=Counter)
    inputs: drift.Counts | None = None

    def add(self, other: Totals) -> None:
        """Add the totals of another task."""
        for name in ("rows", "unaccounted", "again", "other_files", "shadowed", "referred"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("by_grade", "by_error", "by_reason"):
            getattr(self, name).update(getattr(other, name))
        self.add_inputs(other.inputs)

    def count(self, table: pa.Table) -> None:
        """Count the result rows of a table."""
        self.rows += table.num_rows
        self.referred += pc.sum(table["refer"]).as_py() or 0
        self.by_grade.update(_counts(table["grade_name"]))
        self.by_error.update(_counts(table["error_code"]))
        self.by_reason.update(_counts(pc.list_flatten(table["refer_reasons"])))
        self.add_inputs(read_inputs(table))

    def add_inputs(self, more: drift.Counts | None) -> None:
        """Add image statistics."""
        if more is not None:
            self.inputs = more if self.inputs is None else self.inputs + more

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"inputs": self.inputs and self.inputs.model_dump_json()})

    @classmethod
    def from_json(cls, text: str) -> Totals:
        content = json.loads(text)
        counters = {name: Counter(content[name]) for name in ("by_grade", "by_error", "by_reason")}
        inputs = content["inputs"] and drift.Counts.model_validate_json(content["inputs"])
        return cls(**content | counters | {"inputs": inputs})


def read_inputs(table: pa.Table) -> drift.Counts | None:
    """Image statistics that `GradeShard` stored with a committed shard; None for bundles without gates."""
    text = (table.schema.metadata or {}).get(INPUTS_KEY)
    return drift.Counts.model_validate_json(text) if text else None


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(pc.drop_null(values)).to_pylist()}


def gather(out: str, work: str, listing: Listing, guard: Guard, executor: Executor) -> Totals:
    """Write `out/results` from the committed shards, and account for every image.

    Args:
        out: Output directory.
        work: Folder of the shards.
        listing: Listing of the run.
        guard: Guard of the run's lease.
        executor: Runs the tasks.
    """
    items = [
        {"number": number, "groups": json.dumps([asdict(group) for group in groups])}
        for number, groups in enumerate(_divide(listing))
    ]
    totals = Totals()
    task = GatherGroups(out, work, storage.join(work, listing.folder), listing.shard_size, guard)
    logger.info("gathering %d parts", len(items))
    with progress_bar("gathering", len(items)) as (progress, bar):
        for row in executor.map(task, items):
            totals.add(Totals.from_json(row["found"]))
            progress.update(bar, advance=1)
    totals.unaccounted += executor.call(count_repeated, storage.join(out, RESULTS_FOLDER))
    return totals


def _divide(listing: Listing) -> Iterator[list[Listed]]:
    """Divide the groups among tasks: small groups together, up to the rows of one file."""
    groups: list[Listed] = []
    for group in listing.groups:
        rows = sum(other.photographs for other in groups) + group.photographs
        if groups and (group.tars or rows > ROWS_PER_PART):
            yield groups
            groups = []
        groups.append(group)
    yield groups


@dataclass(frozen=True)
class _State:
    """Committed shards of a group."""

    group: Listed
    pieces: dict[str, dict[str, set[int]]]
    ends: dict[str, Ended]

    @classmethod
    def read(cls, work: str, group: Listed) -> _State:
        return cls(group, find_committed(work, group), read_ended(work, group))

    def is_whole(self, shard: str) -> bool:
        return is_whole(self.group, self.pieces.get(shard, {}), self.ends.get(shard))


class GatherGroups:
    """Task: merge some groups into one file, or into several of about `ROWS_PER_PART` rows.

    If a shard is missing or wrong, rows are counted and not written: a shorter file must not replace a
    complete one of an earlier attempt.

    Args:
        out: Output directory.
        work: Folder of the shards.
        listed: Folder of the listed shards.
        shard_size: Images per shard.
        guard: Guard of the run's lease.
    """

    def __init__(self, out: str, work: str, listed: str, shard_size: int, guard: Guard) -> None:
        self._out = out
        self._work = work
        self._listed = listed
        self._size = shard_size
        self._guard = guard

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        totals, part, buffered = Totals(), 0, 0
        tables: list[pa.Table] = []
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            states = [_State.read(self._work, Listed(**group)) for group in json.loads(row["groups"])]
            missing = sum(self._count_missing(state, totals) for state in states)
            for table in chain.from_iterable(self._read_tables(state, totals) for state in states):
                totals.count(table)
                if missing or totals.unaccounted:
                    continue
                tables.append(table)
                buffered += table.num_rows
                if buffered >= ROWS_PER_PART:
                    self._write(row["number"], part, tables)
                    part, buffered, tables = part + 1, 0, []
            if tables and not totals.unaccounted:
                self._write(row["number"], part, tables)
        return {"found": totals.to_json()}

    def _write(self, number: int, part: int, tables: list[pa.Table]) -> None:
        name = f"part-{number:05d}-{part:03d}.parquet"
        self._guard.check()
        write_part(storage.join(self._out, RESULTS_FOLDER, name), pa.concat_tables(tables))

    def _count_missing(self, state: _State, totals: Totals) -> int:
        """Number of shards of a group that are not committed; their images count as unaccounted."""
        missing = [shard for shard in shard_names(state.group, self._size) if not state.is_whole(shard)]
        for shard in missing:
            # A tar counts as one: the number of its images is unknown.
            totals.unaccounted += 1 if state.group.tars else len(self._listed_ids(shard))
        return len(missing)

    def _read_tables(self, state: _State, totals: Totals) -> Iterator[pa.Table]:
        """Read the result rows of the committed shards."""
        starts = count_starts(self._work, state.group)
        for shard in shard_names(state.group, self._size):
            if not state.is_whole(shard):
                continue
            is_tar = bool(state.group.tars)
            tables = (
                self._read_tar(shard, state.ends[shard], totals)
                if is_tar
                else self._read_shard(shard, totals)
            )
            for name, table in tables:
                totals.again += max(0, starts[name] - 1) * table.num_rows
                yield table

    def _listed_ids(self, shard: str) -> list[str]:
        """Location ids of the listed images of a shard."""
        rows = parquet.read(listed_file(self._listed, shard), ["uri", "member"]).to_pylist()
        return [location_id(Location(row["uri"], row["member"])) for row in rows]

    def _read_shard(self, shard: str, totals: Totals) -> Iterator[tuple[str, pa.Table]]:
        table = parquet.read(graded_file(self._work, shard))
        totals.unaccounted += count_differing(self._listed_ids(shard), table["location_id"].to_pylist())
        yield shard, table

    def _read_tar(self, shard: str, end: Ended, totals: Totals) -> Iterator[tuple[str, pa.Table]]:
        totals.other_files += end.other_files
        totals.shadowed += len(end.dropped)
        dropped: dict[int, list[int]] = {}
        for piece, place in end.dropped:
            dropped.setdefault(piece, []).append(place)
        rows = 0
        for number, digest in enumerate(end.digests):
            name = piece_name(shard, end.tag, number)
            table = parquet.read(graded_file(self._work, name))
            if ids_digest(table["location_id"].to_pylist()) != digest:
                totals.unaccounted += table.num_rows
            table = _without(table, dropped.get(number, []))
            rows += table.num_rows
            yield name, table
        totals.unaccounted += abs(end.photographs - rows)


def count_differing(wanted: list[str], ids: list[str]) -> int:
    """Count unaccounted images of a shard; 0 only if each has exactly one row, in order."""
    return 0 if ids == wanted else max(len(wanted), len(ids))


def _without(table: pa.Table, places: list[int]) -> pa.Table:
    """Remove the rows at these places."""
    if not places:
        return table
    keep = np.ones(table.num_rows, bool)
    keep[places] = False
    return table.filter(pa.array(keep))


def write_part(uri: str, table: pa.Table) -> None:
    """Atomically write a large file of result rows, in row groups that a query can skip."""
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(), buffer, compression="zstd", row_group_size=_ROWS_PER_GROUP
    )
    storage.write(uri, buffer.getvalue())


def count_repeated(results: str) -> int:
    """Count repeated rows of a location over all files; DuckDB spills to disk."""
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        if not storage.names_in(results):
            return 0
        with open_duckdb() as connection:
            connection.register("results", parquet.dataset(results))
            query = "select count(*) - count(distinct location_id) from results"
            ((repeated,),) = connection.execute(query).fetchall()
    return int(repeated)
