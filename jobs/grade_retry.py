"""`scalp grade --retry-failed`: failed rows of a finished run once more, each replaced by what comes of it.

Shards are those of any run, below OUT/retry, a group for each part of the results. A part is rewritten whole
from itself and its group, so that a merge that is stopped can be done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.console import progress_bar, read_json, write_json
from jobs.grade_gather import Found, inputs_of, write_part
from jobs.grade_list import Listing, shard_names
from jobs.grade_shards import GRADED, GROUP_SHARDS, LISTED, PATIENCE_S, Listed, graded_file
from jobs.shards import each
from scalp_core import drift, inventory, parquet, storage
from scalp_core.errors import UserError
from scalp_core.results import RESULTS_FOLDER

FOLDER = "retry"
_LISTING_FILE = "listing.json"
_BEFORE_FILE = "before.json"
# Rows of archives: their members were never listed, so they are a source of their own once they are mended.
_NOT_PHOTOGRAPHS = ("bad_archive", "nested_archive", "bad_name")


def is_pending(out: str) -> bool:
    """Whether a retry of a run began and did not end."""
    return storage.exists(storage.join(out, FOLDER, _LISTING_FILE))


def list_failed(
    out: str, work: str, shard_size: int, summary: dict[str, Any]
) -> tuple[Listing, dict[str, Any]]:
    """Failed rows as shards, and the summary of the run before; what the last call found, if it came so far.

    Raises:
        UserError: none of them is of a photograph.
    """
    uri = storage.join(work, _LISTING_FILE)
    if known := read_json(uri):
        listing = Listing(**known | {"groups": tuple(Listed(**group) for group in known["groups"])})
        return listing, read_json(storage.join(work, _BEFORE_FILE)) or {}
    items = [{"part": name} for name in sorted(storage.names_in(storage.join(out, RESULTS_FOLDER)))]
    groups = [Listed(**row) for row in each(items).map(_ListFailed(out, work, shard_size)).iter_rows()]
    groups = sorted((group for group in groups if group.photographs), key=lambda group: group.group)
    if not groups:
        raise UserError(
            f"all failed rows of {out} are of archives; mend them and grade them into another OUT"
        )
    listing = Listing(tuple(groups), shard_size)
    write_json(storage.join(work, _BEFORE_FILE), summary)
    write_json(uri, asdict(listing))
    return listing, summary


class _ListFailed:
    """Task: the failed rows of one part as a group of shards."""

    def __init__(self, out: str, work: str, shard_size: int) -> None:
        self._out = out
        self._work = work
        self._size = shard_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        group = row["part"].removesuffix(".parquet")
        columns = ["uri", "member", "error_code"]
        with storage.patience(PATIENCE_S):
            table = parquet.read(storage.join(self._out, RESULTS_FOLDER, row["part"]), columns)
            failed = pc.and_kleene(
                pc.is_valid(table["error_code"]),
                pc.invert(pc.is_in(table["error_code"], pa.array(_NOT_PHOTOGRAPHS))),
            )
            rows = [
                {"uri": each["uri"], "member": each["member"], "kind": "photograph"}
                for each in table.filter(failed).to_pylist()
            ]
            for place, start in enumerate(range(0, len(rows), self._size)):
                some = pa.Table.from_pylist(rows[start : start + self._size], schema=inventory.LISTED)
                uri = storage.join(self._work, LISTED, group, f"{place:04d}.parquet")
                parquet.write(uri, some)
        assert len(rows) <= GROUP_SHARDS * self._size  # noqa: S101  # a part has fewer rows
        return asdict(Listed(group, photographs=len(rows)))


def merge(out: str, work: str, listing: Listing, before: dict[str, Any]) -> Found:
    """Puts the new rows into the parts in place of the failed ones, and counts all rows anew.

    Args:
        out: of the run.
        work: folder of the retry.
        listing: of the retry.
        before: summary of the run before it.
    """
    retried = {group.group: group for group in listing.groups}
    items = []
    for name in sorted(storage.names_in(storage.join(out, RESULTS_FOLDER))):
        group = retried.get(name.removesuffix(".parquet"))
        items.append({"part": name, "group": json.dumps(group and asdict(group))})
    found = Found(again=before["graded_again"])
    with progress_bar("merging", len(items)) as (progress, bar):
        for row in each(items).map(_Merge(out, work, listing.shard_size)).iter_rows():
            found.add(Found.from_json(row["found"]))
            progress.update(bar, advance=1)
    if before["inputs"] is not None:
        found.add_inputs(drift.Counts.model_validate(before["inputs"]))
    return found


class _Merge:
    """Task: one part with its rows that were graded again."""

    def __init__(self, out: str, work: str, shard_size: int) -> None:
        self._out = out
        self._work = work
        self._size = shard_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        found, group = Found(), json.loads(row["group"])
        with storage.patience(PATIENCE_S):
            uri = storage.join(self._out, RESULTS_FOLDER, row["part"])
            table = parquet.read(uri)
            if group:
                table = self._merged(table, Listed(**group), found)
                write_part(uri, table)
            found.count(table.replace_schema_metadata())
        return {"found": found.to_json()}

    def _merged(self, table: pa.Table, group: Listed, found: Found) -> pa.Table:
        names = storage.names_in(storage.join(self._work, GRADED, group.group))
        again: list[pa.Table] = []
        for shard in shard_names(group, self._size):
            if f"{shard.rsplit('/', 1)[-1]}.parquet" in names:
                again.append(parquet.read(graded_file(self._work, shard)))
                found.add_inputs(inputs_of(again[-1]))
        found.unaccounted += group.photographs - sum(rows.num_rows for rows in again)
        every = pa.concat_tables([rows.replace_schema_metadata() for rows in (table, *again)])
        # The last row of a photograph counts, in the place of its first.
        places = {image_id: place for place, image_id in enumerate(every["image_id"].to_pylist())}
        return every.take([places[image_id] for image_id in table["image_id"].to_pylist()])
