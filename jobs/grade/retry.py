"""Retry the failed images of a finished `scalp grade` run, and replace their rows.

Each retry has a new folder, SCRATCH/retry-ID, with shards like those of a run, one group per file of the
results. It starts when its `retry.json` is written, which also keeps the previous summary. It has ended
when the summary names its ID. So a retry that is stopped anywhere, also while its folder is removed,
either resumes or has ended.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.console import progress_bar, read_json, write_json
from jobs.common.executor import Executor
from jobs.grade.files import (
    GROUP_SHARDS,
    RETRY_TIMEOUT_S,
    Listed,
    Listing,
    count_starts,
    find_committed,
    graded_file,
    listed_file,
    shard_names,
)
from jobs.grade.gather import Totals, count_differing, read_inputs, write_part
from scalp_core import archives, storage
from scalp_core.datasets import scan
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import location_id
from scalp_core.errors import UserError
from scalp_core.results import drift
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import parquet
from scalp_core.storage.lease import Guard

_PREFIX = "retry-"
_STATE_FILE = "retry.json"
_LISTED = "listed"
# Rows of archives, whose members were not listed: grade the fixed archive. Links stay refused.
_NOT_IMAGES = ("bad_archive", "nested_archive", "bad_name", "outside_link")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """A started retry.

    Args:
        name: Name of its folder; the summary names it once its rows are in the results.
        folder: URI of its folder.
        listing: Listing of the failed images.
        before: Summary of the run before the retry.
    """

    name: str
    folder: str
    listing: Listing
    before: dict[str, Any]


def find(scratch: str, summary: dict[str, Any] | None) -> Retry | None:
    """Find the retry that was started and is not in the results yet.

    Args:
        scratch: Scratch folder of the run.
        summary: Summary of the run; None if it is not finished.
    """
    ended = summary["retries"] if summary else []
    for name in sorted(storage.folders_in(scratch)):
        if name.startswith(_PREFIX) and name not in ended:
            folder = storage.join(scratch, name)
            uri = storage.join(folder, _STATE_FILE)
            if state := read_json(uri):
                return Retry(name, folder, Listing.from_json(state["listing"], uri), state["before"])
    return None


def begin(
    out: str, scratch: str, shard_size: int, summary: dict[str, Any], guard: Guard, executor: Executor
) -> Retry:
    """Start a retry: list the failed images of a finished run as shards.

    Raises:
        UserError: The failed rows are all of archives.
    """
    name = f"{_PREFIX}{uuid.uuid4().hex[:8]}"
    folder = storage.join(scratch, name)
    logger.info("listing the failed rows of %s", out)
    items = [{"part": part} for part in _parts(out)]
    listed = executor.map(ListFailed(out, storage.join(folder, _LISTED), shard_size), items)
    groups = sorted((Listed(**row) for row in listed), key=lambda group: group.group)
    listing = Listing(tuple(group for group in groups if group.photographs), shard_size, _LISTED)
    if not listing.groups:
        raise UserError(
            f"all failed rows of {out} are of archives; fix the archives, and grade them into another OUT"
        )
    guard.check()
    write_json(storage.join(folder, _STATE_FILE), {"listing": listing.to_json(), "before": summary})
    return Retry(name, folder, listing, summary)


def _parts(out: str) -> list[str]:
    return sorted(storage.names_in(storage.join(out, RESULTS_FOLDER)))


class ListFailed:
    """Task: list the failed images of one part of the results as a group of shards."""

    def __init__(self, out: str, listed: str, shard_size: int) -> None:
        self._out = out
        self._listed = listed
        self._size = shard_size

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        group = item["part"].removesuffix(".parquet")
        columns = ["uri", "member", "error_code"]
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            table = parquet.read(storage.join(self._out, RESULTS_FOLDER, item["part"]), columns)
            failed = table.filter(pc.is_valid(table["error_code"])).to_pylist()
            rows = [
                {"uri": row["uri"], "member": row["member"], "kind": "photograph"}
                for row in failed
                if _is_image(row)
            ]
            for place, start in enumerate(range(0, len(rows), self._size)):
                chunk = pa.Table.from_pylist(rows[start : start + self._size], schema=scan.LISTED)
                parquet.write(listed_file(self._listed, f"{group}/{place:04d}"), chunk)
        assert len(rows) <= GROUP_SHARDS * self._size  # noqa: S101  # a part has fewer rows
        return asdict(Listed(group, photographs=len(rows)))


def _is_image(row: dict[str, Any]) -> bool:
    is_archive = row["member"] is None and archives.is_archive(row["uri"])
    return not is_archive and row["error_code"] not in _NOT_IMAGES


def merge(out: str, retry: Retry, guard: Guard, executor: Executor) -> Totals:
    """Replace the failed rows by the new rows, and count all rows again.

    Args:
        out: Output directory.
        retry: Retry with committed shards.
        guard: Guard of the run's lease.
        executor: Runs the tasks.
    """
    retried = {group.group: group for group in retry.listing.groups}
    items = []
    for name in _parts(out):
        group = retried.get(name.removesuffix(".parquet"))
        items.append({"part": name, "group": json.dumps(group and asdict(group))})
    task = MergePart(out, retry.folder, retry.listing, guard)
    totals = Totals(again=retry.before["graded_again"])
    with progress_bar("merging", len(items)) as (progress, bar):
        for row in executor.map(task, items):
            totals.add(Totals.from_json(row["found"]))
            progress.update(bar, advance=1)
    if retry.before["inputs"] is not None:
        totals.add_inputs(drift.Counts.model_validate(retry.before["inputs"]))
    totals.unaccounted += abs(totals.rows - retry.before["rows"])
    return totals


class MergePart:
    """Task: replace the retried rows of one part of the results.

    A part is rewritten from itself and its group, so a stopped merge can run again. While a shard of the
    group is missing, the part is not changed.
    """

    def __init__(self, out: str, folder: str, listing: Listing, guard: Guard) -> None:
        self._out = out
        self._folder = folder
        self._listed = storage.join(folder, listing.folder)
        self._size = listing.shard_size
        self._guard = guard

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        totals, group = Totals(), json.loads(row["group"])
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            uri = storage.join(self._out, RESULTS_FOLDER, row["part"])
            table = parquet.read(uri)
            if group:
                table = self._merge_rows(table, Listed(**group), totals)
                if not totals.unaccounted:
                    self._guard.check()
                    write_part(uri, table)
            totals.count(table.replace_schema_metadata())
        return {"found": totals.to_json()}

    def _merge_rows(self, table: pa.Table, group: Listed, totals: Totals) -> pa.Table:
        tables = [table, *self._read_shards(group, totals)]
        rows = pa.concat_tables([part.replace_schema_metadata() for part in tables])
        # The last row of a location counts, in the place of its first.
        places = {key: place for place, key in enumerate(rows["location_id"].to_pylist())}
        return rows.take([places[key] for key in table["location_id"].to_pylist()])

    def _read_shards(self, group: Listed, totals: Totals) -> Iterator[pa.Table]:
        """Result rows of the group's shards; images without their own row count as unaccounted."""
        known, starts = find_committed(self._folder, group), count_starts(self._folder, group)
        for shard in shard_names(group, self._size):
            listed = parquet.read(listed_file(self._listed, shard), ["uri", "member"]).to_pylist()
            wanted = [location_id(Location(row["uri"], row["member"])) for row in listed]
            if shard not in known:
                totals.unaccounted += len(wanted)
                continue
            rows = parquet.read(graded_file(self._folder, shard))
            totals.unaccounted += count_differing(wanted, rows["location_id"].to_pylist())
            totals.add_inputs(read_inputs(rows))
            totals.again += max(0, starts[shard] - 1) * rows.num_rows
            yield rows
