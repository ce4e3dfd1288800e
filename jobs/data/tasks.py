"""Tasks of `scalp prepare`: list a part of a source, examine a shard of it.

Each task atomically writes its result to a file with a deterministic name, so a task that runs again writes
the same file. Imports no module that is slow to load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.isolate import Isolation, counted_try
from scalp_core import storage
from scalp_core.datasets import manifest, reviewed, scan, tables
from scalp_core.datasets.examination import Examination, examine, read_content
from scalp_core.datasets.scan import Root
from scalp_core.labels.decisions import Answers, Conflicts
from scalp_core.labels.log import read_labels
from scalp_core.storage import parquet

LISTED = "listed"
EXAMINED = "examined"
TRIES = "tries"
READERS_FILE = "readers.json"
OBJECTS_PER_SHARD = 512
LISTING_TASKS = 64
# Jobs of hours must survive a restart of the storage server.
RETRY_TIMEOUT_S = 180


def split_roots(roots: list[Root]) -> list[tuple[int, list[Root]]]:
    """Split roots among listing tasks: one item per task, with its number and its roots."""
    return [(number, roots[number::LISTING_TASKS]) for number in range(min(LISTING_TASKS, len(roots)))]


def list_roots(work: str, part: tuple[int, list[Root]]) -> dict[str, int]:
    """List an item of `split_roots` into shards; returns the number of objects of each shard by its name."""
    number, roots = part
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        objects = chain.from_iterable(map(partial(scan.list_root, open_tars=True), roots))
        return write_listed(work, number, objects)


def list_labels(
    work: str, blind_only: bool, conflicts: Conflicts, extended: str | None, log: str
) -> dict[str, int]:
    """List the images of a label log as `list_roots` does, and summarize its readers in `READERS_FILE`.

    With `extended`, prepared data, its images are listed too.
    """
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        labels = read_labels(log)
        answers = Answers(labels, blind_only, conflicts)
        summary = json.dumps(reviewed.summarize(labels, answers), ensure_ascii=False)
        storage.write(storage.join(work, READERS_FILE), summary.encode())
        if extended is None:
            return write_listed(work, 0, reviewed.read_rows(answers))
        known = set(manifest.read_manifest(extended)["sha256"].to_pylist())
        files = storage.list_files(storage.join(extended, manifest.MANIFEST_FOLDER))
        rows_of_data = chain.from_iterable(map(tables.read_rows, files))
        return write_listed(work, 0, reviewed.read_rows(answers, known)) | write_listed(work, 1, rows_of_data)


def write_listed(work: str, number: int, rows: Iterator[dict[str, Any]]) -> dict[str, int]:
    """Write rows of `scan.LISTED` as shards; returns the number of rows of each shard by its name."""
    counts: dict[str, int] = {}
    while chunk := list(islice(rows, OBJECTS_PER_SHARD)):
        name = f"{number:06d}-{len(counts):06d}.parquet"
        counts[name] = len(chunk)
        parquet.write(storage.join(work, LISTED, name), pa.Table.from_pylist(chunk, schema=scan.LISTED))
    return counts


def examine_shard(work: str, base: str, shard: tuple[str, bool]) -> tuple[int, int]:
    """Examine the objects of one shard; stream its rows to an atomically written file.

    A shard that has crashed its process is decoded in a child process: see `isolate`.

    Args:
        work: Folder of the run.
        base: Prefix of the uris in which names are not read as grades.
        shard: Name, and whether to examine it only if an earlier run could not fetch some of its objects.

    Returns:
        The number of objects, and of those that could not be fetched.
    """
    name, is_retry = shard
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        listed = parquet.read(storage.join(work, LISTED, name)).to_pylist()
        if is_retry and not count_unfetched(work, name):
            return len(listed), 0
        with counted_try(storage.join(work, TRIES, name)) as isolated, Isolation() as child:
            content = partial(child.call, read_content) if isolated else read_content
            examined = examine(listed, Examination(base, content))
            batches = (batch for table in examined for batch in table.to_batches())
            reader = pa.RecordBatchReader.from_batches(scan.EXAMINED, batches)
            parquet.write_batches(storage.join(work, EXAMINED, name), reader)
        return len(listed), count_unfetched(work, name)


def count_unfetched(work: str, name: str) -> int:
    """Count the objects of an examined shard that could not be fetched."""
    codes = parquet.read(storage.join(work, EXAMINED, name), ["code"])["code"]
    return int(pc.sum(pc.equal(codes, "fetch_failed")).as_py() or 0)
