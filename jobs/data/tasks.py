"""What the tasks of `scalp prepare` do: list a piece of a source, examine a shard of it.

Each leaves its result in a file of a name that is settled before, whole or not at all: a task that is run
again writes the same file again. Imports nothing that is slow to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

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
OBJECTS_A_SHARD = 512
# A server that restarts is waited for; a job of hours must not end with it.
RETRY_TIMEOUT_S = 180


LISTING_TASKS = 64


def each(items: list[dict[str, Any]]) -> Dataset:
    """A dataset of one block an item, so that each is a task of its own."""
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))


def shares(roots: list[Root]) -> list[dict[str, Any]]:
    """Items for the tasks that list: some roots each, and a number."""
    parts = [roots[number::LISTING_TASKS] for number in range(min(LISTING_TASKS, len(roots)))]
    return [
        {
            "number": number,
            "uris": [root.uri for root in part],
            "whole": [root.whole for root in part],
            "within": [root.within for root in part],
        }
        for number, part in enumerate(parts)
    ]


def roots_in(share: dict[str, Any]) -> Iterator[Root]:
    """The roots of an item of `shares`."""
    return map(Root, share["uris"], share["whole"], share["within"])


class ListRoots:
    """Writes the shards of some roots of a source; returns their names and how many objects are in each."""

    def __init__(self, work: str) -> None:
        self._work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            rows = chain.from_iterable(map(scan.list_root, roots_in(row)))
            return write_listed(self._work, row["number"], rows)


def write_listed(work: str, number: int, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Writes rows of `scan.LISTED` as shards; their names, and how many rows are in each."""
    names: list[str] = []
    counts: list[int] = []
    while some := list(islice(rows, OBJECTS_A_SHARD)):
        names.append(f"{number:06d}-{len(names):06d}.parquet")
        counts.append(len(some))
        table = pa.Table.from_pylist(some, schema=scan.LISTED)
        parquet.write(storage.join(work, LISTED, names[-1]), table)
    return {"names": names, "counts": counts}


class ExamineShard:
    """Examines the objects of one shard; writes its rows atomically, a stream that nobody holds.

    A shard that ended its process before is decoded in a child process: see `isolate`.

    Args:
        work: folder of the run.
        base: start of the uris that says nothing about grades.
        group_by: what gives the groups, if anything.
    """

    def __init__(self, work: str, base: str, group_by: GroupBy | None = None) -> None:
        self._work = work
        self._base = base
        self._group_by = group_by

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Examines the shard `name`; with `retry`, only if some of its objects could not be fetched."""
        name = row["name"]
        with storage.retry_timeout(RETRY_TIMEOUT_S):
            listed = parquet.read(storage.join(self._work, LISTED, name)).to_pylist()
            if row.get("retry") and not self._unfetched(name):
                return {"objects": len(listed), "unfetched": 0}
            with counted_try(storage.join(self._work, TRIES, name)) as isolated, Isolation() as child:
                content = partial(child.call, read_content) if isolated else read_content
                how = Examination(self._base, self._group_by, content)
                batches = (batch for table in examine(listed, how) for batch in table.to_batches())
                reader = pa.RecordBatchReader.from_batches(scan.EXAMINED, batches)
                parquet.write_batches(storage.join(self._work, EXAMINED, name), reader)
            return {"objects": len(listed), "unfetched": self._unfetched(name)}

    def _unfetched(self, name: str) -> int:
        codes = parquet.read(storage.join(self._work, EXAMINED, name), ["code"])["code"]
        return int(pc.sum(pc.equal(codes, "fetch_failed")).as_py() or 0)
