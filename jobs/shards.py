"""What the tasks of `scalp prepare` do: list a piece of a source, examine a shard of it.

Each leaves its result in a file of a name that is settled before, whole or not at all: a task that is run
again writes the same file again. Imports nothing that is slow to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from scalp_core import examination, inventory, parquet, storage
from scalp_core.inventory import Root

LISTED = "listed"
EXAMINED = "examined"
OBJECTS_A_SHARD = 512
# A server that restarts is waited for; a job of hours must not end with it.
PATIENCE_S = 180


LISTING_TASKS = 64


def each(items: list[dict[str, Any]]) -> Dataset:
    """A dataset of one block an item, so that each is a task of its own."""
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))


def shares(roots: list[Root]) -> list[dict[str, Any]]:
    """Items for the tasks that list: some roots each, and a number."""
    parts = [roots[number::LISTING_TASKS] for number in range(min(LISTING_TASKS, len(roots)))]
    return [
        {"number": number, "uris": [root.uri for root in part], "whole": [root.whole for root in part]}
        for number, part in enumerate(parts)
    ]


class ListRoots:
    """Writes the shards of some roots of a source; returns their names and how many objects are in each."""

    def __init__(self, work: str) -> None:
        self._work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with storage.patience(PATIENCE_S):
            roots = (Root(uri, whole) for uri, whole in zip(row["uris"], row["whole"], strict=True))
            rows = chain.from_iterable(map(inventory.list_root, roots))
            return write_listed(self._work, row["number"], rows)


def write_listed(work: str, number: int, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Writes rows of `inventory.LISTED` as shards; their names, and how many rows are in each."""
    names: list[str] = []
    counts: list[int] = []
    while some := list(islice(rows, OBJECTS_A_SHARD)):
        names.append(f"{number:06d}-{len(names):06d}.parquet")
        counts.append(len(some))
        table = pa.Table.from_pylist(some, schema=inventory.LISTED)
        parquet.write(storage.join(work, LISTED, names[-1]), table)
    return {"names": names, "counts": counts}


class ExamineShard:
    """Examines the objects of one shard; writes its rows whole or not at all."""

    def __init__(self, work: str, base: str) -> None:
        self._work = work
        self._base = base

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with storage.patience(PATIENCE_S):
            listed = parquet.read(storage.join(self._work, LISTED, row["name"])).to_pylist()
            tables = list(examination.examine(listed, self._base))
            table = pa.concat_tables(tables)
            parquet.write(storage.join(self._work, EXAMINED, row["name"]), table)
        unfetched = sum(code == "fetch_failed" for code in table["code"].to_pylist())
        return {"objects": len(listed), "rows": table.num_rows, "unfetched": unfetched}
