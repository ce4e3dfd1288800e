"""Retry the failed images of a finished `scalp grade` run, and replace their rows.

Each retry has a new folder, SCRATCH/retry-ID, with shards like those of a run, one group per file of the
results. It starts when its `retry.json` is written, which also keeps the previous summary. It has ended
when the summary names its ID. So a retry that is stopped anywhere, also while its folder is removed,
either resumes or has ended.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.console import progress_bar, read_json, write_json
from jobs.common.executor import Executor
from jobs.grade.files import RETRY_TIMEOUT_S, GroupState, Listed, Listing, write_group
from jobs.grade.gather import Totals, count_all, count_missing, read_tables, write_part
from scalp_core import archives, storage
from scalp_core.errors import UserError
from scalp_core.results import drift
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import parquet
from scalp_core.storage.lease import Guard
from scalp_core.storage.outputs import Output

_PREFIX = "retry-"
_STATE_FILE = "retry.json"
_LISTED = "listed"
# Rows of archives, whose members were not listed: grade the fixed archive. Links stay refused.
_NOT_IMAGES = ("bad_archive", "nested_archive", "bad_name", "outside_link")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """A started retry: its folder, its listing of failed images, and the summary of the run before it."""

    name: str
    folder: str
    listing: Listing
    before: dict[str, Any]


def find(scratch: str, summary: dict[str, Any]) -> Retry | None:
    """Find the retry that was started and is not in the results yet, of a run with this summary."""
    for name in sorted(storage.folders_in(scratch)):
        if name.startswith(_PREFIX) and name not in summary["retries"]:
            folder = storage.join(scratch, name)
            uri = storage.join(folder, _STATE_FILE)
            if state := read_json(uri):
                return Retry(name, folder, Listing.from_json(state["listing"], uri), state["before"])
    return None


def begin(output: Output, shard_size: int, summary: dict[str, Any], executor: Executor) -> Retry:
    """Start a retry: list the failed images of a finished run as shards.

    Raises:
        UserError: The failed rows are all of archives.
    """
    name = f"{_PREFIX}{uuid.uuid4().hex[:8]}"
    folder, out = storage.join(output.scratch, name), output.uri
    logger.info("listing the failed rows of %s", out)
    list_part = partial(_list_failed, out, storage.join(folder, _LISTED), shard_size)
    groups = sorted(executor.map(list_part, _parts(out)), key=lambda group: group.group)
    listing = Listing(tuple(group for group in groups if group.photographs), shard_size, _LISTED)
    if not listing.groups:
        raise UserError(
            f"all failed rows of {out} are of archives; fix the archives, and grade them into another OUT"
        )
    output.check()
    write_json(storage.join(folder, _STATE_FILE), {"listing": listing.to_json(), "before": summary})
    return Retry(name, folder, listing, summary)


def _parts(out: str) -> list[str]:
    return sorted(storage.names_in(storage.join(out, RESULTS_FOLDER)))


def _list_failed(out: str, folder: str, shard_size: int, part: str) -> Listed:
    """List the failed images of one part of the results as a group of shards."""
    group = part.removesuffix(".parquet")
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        table = parquet.read(storage.join(out, RESULTS_FOLDER, part), ["uri", "member", "error_code"])
        failed = table.filter(pc.is_valid(table["error_code"])).to_pylist()
        rows = (
            {"uri": row["uri"], "member": row["member"], "kind": "photograph"}
            for row in failed
            if _is_image(row)
        )
        return Listed(group, photographs=write_group(folder, group, shard_size, rows))


def _is_image(row: dict[str, Any]) -> bool:
    is_archive = row["member"] is None and archives.is_archive(row["uri"])
    return not is_archive and row["error_code"] not in _NOT_IMAGES


def merge(output: Output, retry: Retry, executor: Executor) -> Totals:
    """Replace the failed rows by the new rows of a graded retry, and count all rows again."""
    groups, totals = retry.listing.groups, Totals()
    with progress_bar("merging", len(groups)) as (progress, bar):
        for counted in executor.map(MergePart(output.uri, retry.folder, retry.listing, output.guard), groups):
            totals.add(counted)
            progress.update(bar, advance=1)
    if retry.before["inputs"] is not None:
        totals.add_inputs(drift.Counts.model_validate(retry.before["inputs"]))
    count_all(output.uri, totals, executor)
    totals.unaccounted += abs(totals.counts["rows"] - retry.before["rows"])
    return totals


@dataclass(frozen=True)
class MergePart:
    """Task: replace the retried rows of the part of the results that has the name of a group.

    A part is rewritten from itself and its group, so a stopped merge can run again. While a shard of the
    group is missing, the part is not changed.
    """

    out: str
    work: str
    listing: Listing
    guard: Guard

    def __call__(self, group: Listed) -> Totals:
        totals, uri = Totals(), storage.join(self.out, RESULTS_FOLDER, f"{group.group}.parquet")
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            before, state = parquet.read(uri), GroupState(self.work, self.listing, group)
            count_missing(state, totals)
            rows = pa.concat_tables([before, *read_tables(self.work, state, totals)])
            if not totals.unaccounted:
                # The last row of a location counts, in the place of its first.
                places = {key: place for place, key in enumerate(rows["location_id"].to_pylist())}
                self.guard.check()
                write_part(uri, rows.take([places[key] for key in before["location_id"].to_pylist()]))
        return totals
