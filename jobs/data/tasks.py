"""Tasks of `scalp prepare`: list a part of a source, examine a shard of it.

Each task atomically writes its result to a file with a deterministic name, so a task that runs again writes
the same file. Imports no module that is slow to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.isolate import Isolation, counted_try
from scalp_core import storage
from scalp_core.datasets import scan
from scalp_core.datasets.examination import Examination, examine, read_content
from scalp_core.datasets.group_by import GroupBy
from scalp_core.datasets.scan import Root
from scalp_core.storage import parquet

LISTED = "listed"
EXAMINED = "examined"
TRIES = "tries"
OBJECTS_PER_SHARD = 512
LISTING_TASKS = 64
# Jobs of hours must survive a restart of the storage server.
RETRY_TIMEOUT_S = 180


def split_roots(roots: list[Root]) -> list[tuple[int, list[Root]]]:
    """Split roots among listing tasks: one item per task, with its number and its roots."""
    return [(number, roots[number::LISTING_TASKS]) for number in range(min(LISTING_TASKS, len(roots)))]


class ListRoots:
    """Task: list roots of a source into shards; return their names and numbers of objects."""

    def __init__(self, work: str) -> None:
        self._work = work

    def __call__(self, part: tuple[int, list[Root]]) -> dict[str, Any]:
        number, roots = part
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            return write_listed(self._work, number, chain.from_iterable(map(scan.list_root, roots)))


def write_listed(work: str, number: int, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Write rows of `scan.LISTED` as shards; return their names and numbers of rows."""
    names: list[str] = []
    counts: list[int] = []
    while chunk := list(islice(rows, OBJECTS_PER_SHARD)):
        names.append(f"{number:06d}-{len(names):06d}.parquet")
        counts.append(len(chunk))
        table = pa.Table.from_pylist(chunk, schema=scan.LISTED)
        parquet.write(storage.join(work, LISTED, names[-1]), table)
    return {"names": names, "counts": counts}


class ExamineShard:
    """Task: examine the objects of one shard; stream its rows to an atomically written file.

    A shard that has crashed its process is decoded in a child process: see `isolate`.
    """

    def __init__(self, work: str, base: str, group_by: GroupBy | None = None) -> None:
        self._work = work
        self._base = base
        self._group_by = group_by

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Examine the shard `name`; with `retry`, only if some of its objects could not be fetched."""
        name = row["name"]
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            listed = parquet.read(storage.join(self._work, LISTED, name)).to_pylist()
            if row.get("retry") and not self._unfetched(name):
                return {"objects": len(listed), "unfetched": 0}
            with counted_try(storage.join(self._work, TRIES, name)) as isolated, Isolation() as child:
                content = partial(child.call, read_content) if isolated else read_content
                examination = Examination(self._base, self._group_by, content)
                batches = (batch for table in examine(listed, examination) for batch in table.to_batches())
                reader = pa.RecordBatchReader.from_batches(scan.EXAMINED, batches)
                parquet.write_batches(storage.join(self._work, EXAMINED, name), reader)
            return {"objects": len(listed), "unfetched": self._unfetched(name)}

    def _unfetched(self, name: str) -> int:
        codes = parquet.read(storage.join(self._work, EXAMINED, name), ["code"])["code"]
        return int(pc.sum(pc.equal(codes, "fetch_failed")).as_py() or 0)
