"""The third step of `scalp grade`: many small files become few large ones, and all rows are counted.

A part's file is written whole under a settled name, so what is gathered again gives the same files again.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs.console import progress_bar
from jobs.grade_list import Listing, shard_names
from jobs.grade_run import ended
from jobs.grade_shards import GRADED, INPUTS_KEY, PATIENCE_S, STARTED, Listed, graded_file, listed_file
from jobs.shards import each
from scalp_core import drift, parquet, storage
from scalp_core.manifest import location_id
from scalp_core.results import RESULTS_FOLDER
from scalp_core.sources import Location
from scalp_core.sql import spilling

ROWS_A_PART = 250_000
_ROWS_A_GROUP = 25_000


@dataclass
class Found:
    """What result rows say in sum.

    Args:
        rows: that there are.
        unaccounted: photographs without a row, with another's, or with more than one.
        again: photographs that a model began more than once: the most that was done twice.
        other_files: in tars.
        shadowed: in tars.
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

    def add(self, other: Found) -> None:
        for name in ("rows", "unaccounted", "again", "other_files", "shadowed", "referred"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("by_grade", "by_error", "by_reason"):
            getattr(self, name).update(getattr(other, name))
        self.add_inputs(other.inputs)

    def count(self, table: pa.Table) -> None:
        """Takes in result rows."""
        self.rows += table.num_rows
        self.referred += pc.sum(table["refer"]).as_py() or 0
        self.by_grade.update(_counts(table["grade_name"]))
        self.by_error.update(_counts(table["error_code"]))
        self.by_reason.update(_counts(pc.list_flatten(table["refer_reasons"])))
        self.add_inputs(inputs_of(table))

    def add_inputs(self, more: drift.Counts | None) -> None:
        """Takes in what was measured of photographs."""
        if more is not None:
            self.inputs = more if self.inputs is None else self.inputs + more

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"inputs": self.inputs and self.inputs.model_dump_json()})

    @classmethod
    def from_json(cls, text: str) -> Found:
        content = json.loads(text)
        counters = {name: Counter(content[name]) for name in ("by_grade", "by_error", "by_reason")}
        inputs = content["inputs"] and drift.Counts.model_validate_json(content["inputs"])
        return cls(**content | counters | {"inputs": inputs})


def inputs_of(table: pa.Table) -> drift.Counts | None:
    """What `GradeShard` measured of the photographs of a committed shard; None of bundles without gates."""
    text = (table.schema.metadata or {}).get(INPUTS_KEY)
    return drift.Counts.model_validate_json(text) if text else None


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(pc.drop_null(values)).to_pylist()}


def gather(out: str, work: str, listing: Listing) -> Found:
    """Writes `out/results` from the committed shards, and accounts for every photograph.

    Args:
        out: of the run.
        work: folder of the shards.
        listing: what there is.
    """
    items = [
        {"number": number, "groups": json.dumps([asdict(group) for group in some])}
        for number, some in enumerate(_together(listing))
    ]
    found = Found()
    with progress_bar("gathering", len(items)) as (progress, bar):
        for row in each(items).map(_Gather(out, work, listing.shard_size)).iter_rows():
            found.add(Found.from_json(row["found"]))
            progress.update(bar, advance=1)
    found.unaccounted += ray.get(_twice.remote(storage.join(out, RESULTS_FOLDER)))
    return found


def _together(listing: Listing) -> Iterator[list[Listed]]:
    """Groups that one task gathers: enough for one file, where they are small."""
    some: list[Listed] = []
    for group in listing.groups:
        if some and (group.tars or sum(each.photographs for each in some) + group.photographs > ROWS_A_PART):
            yield some
            some = []
        some.append(group)
    yield some


class _Gather:
    """Task: some groups to one file, or to several of at most `ROWS_A_PART` rows."""

    def __init__(self, out: str, work: str, shard_size: int) -> None:
        self._out = out
        self._work = work
        self._size = shard_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found, part, waiting = Found(), 0, 0
        tables: list[pa.Table] = []
        with storage.patience(PATIENCE_S):
            for group in json.loads(row["groups"]):
                for table in self._shards(Listed(**group), found):
                    found.count(table)
                    tables.append(table)
                    waiting += table.num_rows
                    if waiting >= ROWS_A_PART:
                        self._write(row["number"], part, tables)
                        part, waiting, tables = part + 1, 0, []
            if tables:
                self._write(row["number"], part, tables)
        return {"found": found.to_json()}

    def _write(self, number: int, part: int, tables: list[pa.Table]) -> None:
        name = f"part-{number:05d}-{part:03d}.parquet"
        write_part(storage.join(self._out, RESULTS_FOLDER, name), pa.concat_tables(tables))

    def _shards(self, group: Listed, found: Found) -> Iterator[pa.Table]:
        names = storage.names_in(storage.join(self._work, GRADED, group.group))
        begun = Counter(
            name.rsplit(".", 1)[0]
            for name in storage.names_in(storage.join(self._work, STARTED, group.group))
        )
        read = self._tar if group.tars else self._listed
        for shard in shard_names(group, self._size):
            for name, table in read(shard, names, found):
                found.again += max(0, begun[name] - 1) * table.num_rows
                yield table

    def _listed(self, shard: str, names: set[str], found: Found) -> Iterator[tuple[str, pa.Table]]:
        listed = parquet.read(listed_file(self._work, shard), ["uri", "member"]).to_pylist()
        name = shard.rsplit("/", 1)[-1]
        if f"{name}.parquet" not in names:
            found.unaccounted += len(listed)
            return
        table = parquet.read(graded_file(self._work, shard))
        wanted = [location_id(Location(row["uri"], row["member"])) for row in listed]
        if table["image_id"].to_pylist() != wanted:
            found.unaccounted += max(len(wanted), table.num_rows)
        yield name, table

    def _tar(self, shard: str, names: set[str], found: Found) -> Iterator[tuple[str, pa.Table]]:
        end = ended(self._work, shard)
        if end is None:
            found.unaccounted += 1  # the archive itself: nobody knows how many are in it
            return
        rows = 0
        found.other_files += end["other_files"]
        found.shadowed += end["shadowed"]
        for piece in range(end["pieces"]):
            name = f"{shard.rsplit('/', 1)[-1]}.{piece:05d}"
            if f"{name}.parquet" in names:
                table = parquet.read(graded_file(self._work, f"{shard}.{piece:05d}"))
                rows += table.num_rows
                yield name, table
        found.unaccounted += end["photographs"] - rows


def write_part(uri: str, table: pa.Table) -> None:
    """A large file of result rows, whole or not at all, in groups that a query can skip."""
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(), buffer, compression="zstd", row_group_size=_ROWS_A_GROUP)
    storage.write(uri, buffer.getvalue())


@ray.remote(num_cpus=1)
def _twice(results: str) -> int:
    """Rows beyond the first of each photograph, over all files; DuckDB spills to disk."""
    with storage.patience(PATIENCE_S):
        if not storage.names_in(results):
            return 0
        rows = parquet.dataset(results)
        with spilling() as connection:
            connection.register("results", rows)
            (more,) = connection.execute("select count(*) - count(distinct image_id) from results").fetchall()
    return int(more[0])
