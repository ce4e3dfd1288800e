"""Third step of `scalp grade`: merge the rows of shards into few large files, and account for each image.

Each file is written atomically under a deterministic name, so gathering again writes the same files. In Ray,
a part is merged as soon as its shards are committed, while the next ones are graded.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.common.console import progress_bar
from jobs.common.executor import Executor
from jobs.grade.files import (
    INPUTS_KEY,
    RETRY_TIMEOUT_S,
    Ended,
    GroupState,
    Listed,
    Listing,
    graded_file,
    group_of,
    ids_digest,
    piece_name,
    shard_names,
)
from scalp_core import storage
from scalp_core.results import drift
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import open_duckdb
from scalp_core.storage.lease import Guard

ROWS_PER_PART = 250_000
_ROWS_PER_GROUP = 25_000
# Each row of a location beyond its first is one too many.
_COUNTS = """
    select count(*) as rows, count(distinct location_id) as locations,
        count(*) filter (status = 'graded') as graded, count(*) filter (refer) as referred,
        histogram(grade_name) as by_grade, histogram(error_code) as by_error
    from results
"""
_REASONS = "select histogram(reason) as by_reason from (select unnest(refer_reasons) as reason from results)"

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """Totals of a run.

    Args:
        unaccounted: Images without a row, with the row of another image, or with several rows.
        other_files: Members of tars that are not images by their name.
        shadowed: Members of tars that share their name with a later one.
        inputs: Image statistics, for the drift check.
        counts: Result of `count_rows`.
    """

    unaccounted: int = 0
    other_files: int = 0
    shadowed: int = 0
    inputs: drift.Counts | None = None
    counts: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Totals) -> None:
        """Add the totals of another task."""
        self.unaccounted += other.unaccounted
        self.other_files += other.other_files
        self.shadowed += other.shadowed
        self.add_inputs(other.inputs)

    def add_inputs(self, more: drift.Counts | None) -> None:
        """Add image statistics."""
        if more is not None:
            self.inputs = more if self.inputs is None else self.inputs + more


class Gathering:
    """Writes `out/results` from the committed shards in `work`, and accounts for every image.

    Parts of tars, whose pieces are not counted before they are read, and parts of which an earlier session
    committed shards, are merged at the end.
    """

    def __init__(self, out: str, work: str, listing: Listing, guard: Guard, executor: Executor) -> None:
        self._out = out
        self._executor = executor
        self._task = GatherGroups(out, work, listing, guard)
        self._waiting = dict(enumerate(_divide(listing)))
        self._started: list[Callable[[], Totals]] = []
        self._part_of = {
            group.group: number
            for number, groups in self._waiting.items()
            for group in groups
            if not group.tars
        }
        self._left = {
            number: sum(len(shard_names(group, listing.shard_size)) for group in groups)
            for number, groups in self._waiting.items()
        }

    def count(self, shard: str) -> None:
        """Count a committed shard; the last one of a part starts its merge."""
        number = self._part_of.get(group_of(shard))
        if number is None:
            return
        self._left[number] -= 1
        if not self._left[number]:
            part = number, self._waiting.pop(number)
            self._started.append(self._executor.submit(self._task, part))

    def finish(self) -> Totals:
        """Merge the other parts, wait for all, and count all rows."""
        totals, parts = Totals(), len(self._started) + len(self._waiting)
        logger.info("gathering %d parts, %d of them already started", parts, len(self._started))
        with progress_bar("gathering", parts) as (progress, bar):
            for counted in chain(
                self._executor.map(self._task, self._waiting.items()), (wait() for wait in self._started)
            ):
                totals.add(counted)
                progress.update(bar, advance=1)
        return count_all(self._out, totals, self._executor)


def count_all(out: str, totals: Totals, executor: Executor) -> Totals:
    """Count all rows of an output, and add repeated ones to `totals.unaccounted`."""
    totals.counts = executor.call(count_rows, storage.join(out, RESULTS_FOLDER))
    totals.unaccounted += totals.counts["rows"] - totals.counts["locations"]
    return totals


def count_rows(results: str) -> dict[str, Any]:
    """Count rows, locations, graded and referred rows, and rows by grade, error and reason, in all files."""
    with storage.retry_timeout(RETRY_TIMEOUT_S), open_duckdb() as connection:
        if not storage.names_in(results):
            nothing = dict.fromkeys(("rows", "locations", "graded", "referred"), 0)
            return nothing | {"by_grade": {}, "by_error": {}, "by_reason": {}}
        connection.register("results", parquet.dataset(results))
        tables = [connection.sql(query).to_arrow_table() for query in (_COUNTS, _REASONS)]
    (counts,), (reasons,) = (table.to_pylist(maps_as_pydicts="strict") for table in tables)
    return {
        name: value or {} if name.startswith("by_") else value for name, value in (counts | reasons).items()
    }


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

    If a shard is missing or wrong, nothing more is written: a shorter file must not replace a complete one of
    an earlier attempt.
    """

    out: str
    work: str
    listing: Listing
    guard: Guard

    def __call__(self, numbered: tuple[int, list[Listed]]) -> Totals:
        number, groups = numbered
        totals, part, buffered = Totals(), 0, 0
        tables: list[pa.Table] = []
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            states = [GroupState(self.work, self.listing, group) for group in groups]
            for state in states:
                count_missing(state, totals)
            for table in chain.from_iterable(read_tables(self.work, state, totals) for state in states):
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


def count_missing(state: GroupState, totals: Totals) -> None:
    """Count images of shards that are not committed; a tar as one, as the number is unknown."""
    totals.unaccounted += sum(map(state.count_listed, state.pending))


def read_tables(work: str, state: GroupState, totals: Totals) -> Iterator[pa.Table]:
    """Read the result rows of the committed shards of a group; count what differs from the listing."""
    for shard in filter(state.is_whole, state.shards):
        if end := state.ends.get(shard):
            tables = _read_tar(work, shard, end, totals)
        else:
            tables = iter([_read_shard(work, shard, state.listed_ids(shard), totals)])
        for table in tables:
            text = (table.schema.metadata or {}).get(INPUTS_KEY)  # from `GradeShard`, of bundles with gates
            totals.add_inputs(drift.Counts.model_validate_json(text) if text else None)
            yield table.replace_schema_metadata()


def _read_shard(work: str, shard: str, listed: list[str], totals: Totals) -> pa.Table:
    table = parquet.read(graded_file(work, shard))
    totals.unaccounted += count_differing(listed, table["location_id"].to_pylist())
    return table


def _read_tar(work: str, shard: str, end: Ended, totals: Totals) -> Iterator[pa.Table]:
    totals.other_files += end.other_files
    totals.shadowed += len(end.dropped)
    dropped: dict[int, list[int]] = {}
    for piece, place in end.dropped:
        dropped.setdefault(piece, []).append(place)
    rows = 0
    for number, digest in enumerate(end.digests):
        table = parquet.read(graded_file(work, piece_name(shard, end.tag, number)))
        if ids_digest(table["location_id"].to_pylist()) != digest:
            totals.unaccounted += table.num_rows
        table = table.take(np.delete(np.arange(table.num_rows), dropped.get(number, [])))
        rows += table.num_rows
        yield table
    totals.unaccounted += abs(end.photographs - rows)


def count_differing(wanted: list[str], ids: list[str]) -> int:
    """Count unaccounted images of a shard; 0 only if each has exactly one row, in order."""
    return 0 if ids == wanted else max(len(wanted), len(ids))


def write_part(uri: str, table: pa.Table) -> None:
    """Atomically write a large file of result rows, in row groups that a query can skip."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    storage.write(uri, buffer.getvalue())
