"""Third step of `scalp grade`: merge the rows of shards into few large files, and account for each image.

Each file is written atomically under a deterministic name, so gathering again writes the same files.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

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
    GroupState,
    Listed,
    ListedGroup,
    Listing,
    count_starts,
    graded_file,
    ids_digest,
    piece_name,
)
from scalp_core import storage
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
        unaccounted: Images without a row, with the row of another image, or with several rows.
        again: Images of shards that a model started again: an upper bound of repeated work.
        other_files: Members of tars that are not images by their name.
        shadowed: Members of tars that share their name with a later one.
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
        self.rows += other.rows
        self.unaccounted += other.unaccounted
        self.again += other.again
        self.other_files += other.other_files
        self.shadowed += other.shadowed
        self.referred += other.referred
        self.by_grade += other.by_grade
        self.by_error += other.by_error
        self.by_reason += other.by_reason
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


def read_inputs(table: pa.Table) -> drift.Counts | None:
    """Image statistics that `GradeShard` stored with a committed shard; None for bundles without gates."""
    text = (table.schema.metadata or {}).get(INPUTS_KEY)
    return drift.Counts.model_validate_json(text) if text else None


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(pc.drop_null(values)).to_pylist()}


def gather(out: str, work: str, listing: Listing, guard: Guard, executor: Executor) -> Totals:
    """Write `out/results` from the committed shards in `work`, and account for every image."""
    parts = list(enumerate(_divide(listing)))
    totals = Totals()
    task = GatherGroups(out, GradedShards.of(work, listing), guard)
    logger.info("gathering %d parts", len(parts))
    with progress_bar("gathering", len(parts)) as (progress, bar):
        for counted in executor.map(task, parts):
            totals.add(counted)
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
class GatherGroups:
    """Task: merge some groups into one file, or into several of about `ROWS_PER_PART` rows.

    If a shard is missing or wrong, rows are counted and not written: a shorter file must not replace a
    complete one of an earlier attempt.
    """

    out: str
    shards: GradedShards
    guard: Guard

    def __call__(self, numbered: tuple[int, list[Listed]]) -> Totals:
        number, groups = numbered
        totals, part, buffered = Totals(), 0, 0
        tables: list[pa.Table] = []
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            states = list(map(self.shards.state, groups))
            for state in states:
                self.shards.count_missing(state, totals)
            for table in chain.from_iterable(self.shards.read_tables(state, totals) for state in states):
                totals.count(table)
                if totals.unaccounted:
                    continue
                tables.append(table)
                buffered += table.num_rows
                if buffered >= ROWS_PER_PART:
                    self._write(number, part, tables)
                    part, buffered, tables = part + 1, 0, []
            if tables and not totals.unaccounted:
                self._write(number, part, tables)
        return totals

    def _write(self, number: int, part: int, tables: list[pa.Table]) -> None:
        name = f"part-{number:05d}-{part:03d}.parquet"
        self.guard.check()
        write_part(storage.join(self.out, RESULTS_FOLDER, name), pa.concat_tables(tables))


@dataclass(frozen=True)
class GradedShards:
    """Reader of the committed shards of a run or a retry, in `work`, and of its listing, in `listed`."""

    work: str
    listed: str
    shard_size: int

    @classmethod
    def of(cls, work: str, listing: Listing) -> GradedShards:
        return cls(work, storage.join(work, listing.folder), listing.shard_size)

    def state(self, group: Listed) -> GroupState:
        return GroupState.read(self.work, group, self.shard_size)

    def count_missing(self, state: GroupState, totals: Totals) -> None:
        """Count images of shards that are not committed; a tar as one, as the number is unknown."""
        if missing := [shard for shard in state.shards if not state.is_whole(shard)]:
            listed = ListedGroup(self.listed, state.group)
            totals.unaccounted += sum(map(listed.count, missing))

    def read_tables(self, state: GroupState, totals: Totals) -> Iterator[pa.Table]:
        """Read the result rows of the committed shards."""
        starts = count_starts(self.work, state.group)
        listed = ListedGroup(self.listed, state.group)
        for shard in filter(state.is_whole, state.shards):
            end = state.ends.get(shard)
            tables = self._read_tar(shard, end, totals) if end else self._read_shard(shard, listed, totals)
            for name, table in tables:
                totals.again += max(0, starts[name] - 1) * table.num_rows
                yield table

    def _read_shard(self, shard: str, listed: ListedGroup, totals: Totals) -> Iterator[tuple[str, pa.Table]]:
        table = parquet.read(graded_file(self.work, shard))
        ids = table["location_id"].to_pylist()
        totals.unaccounted += count_differing(listed.ids(shard), ids)
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
            table = parquet.read(graded_file(self.work, name))
            if ids_digest(table["location_id"].to_pylist()) != digest:
                totals.unaccounted += table.num_rows
            table = table.take(np.delete(np.arange(table.num_rows), dropped.get(number, [])))
            rows += table.num_rows
            yield name, table
        totals.unaccounted += abs(end.photographs - rows)


def count_differing(wanted: list[str], ids: list[str]) -> int:
    """Count unaccounted images of a shard; 0 only if each has exactly one row, in order."""
    return 0 if ids == wanted else max(len(wanted), len(ids))


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
