"""First step of `scalp grade`: list the images of the sources into shards.

Each attempt writes into a new folder; `listing.json` names the complete one. So files of a killed attempt are
not read, and a task that runs again writes the same files.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, islice
from typing import Any

from jobs.common.console import console, progress_bar, read_json, write_json
from jobs.common.executor import Executor
from jobs.data.tasks import split_roots
from jobs.grade.files import (
    GROUP_SHARDS,
    GROUP_TARS,
    RETRY_TIMEOUT_S,
    Listed,
    Listing,
    listed_file,
    read_listed_rows,
    write_group,
)
from scalp_core import archives, storage
from scalp_core.datasets import locations, manifest, scan
from scalp_core.datasets.scan import Root, batched
from scalp_core.errors import SourceError, UserError
from scalp_core.results.progress import LISTING_FILE
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import open_duckdb

logger = logging.getLogger(__name__)


def read_listing(work: str) -> Listing | None:
    """Read the listing of a run or a retry; None until it is complete.

    Raises:
        UserError: Another version of scalp wrote it.
    """
    uri = storage.join(work, LISTING_FILE)
    content = read_json(uri)
    return Listing.from_json(content, uri) if content else None


def list_sources(
    named: Sequence[str],
    work: str,
    shard_size: int,
    executor: Executor,
    tables: bool = True,
    links: bool = True,
) -> Listing:
    """List images into shards below `work`; reuse the listing of an earlier session.

    Args:
        named: Folders, prefixes, archives, tables, and outputs of `scalp prepare`.
        work: Folder of the run.
        shard_size: Images per shard.
        executor: Runs the listing tasks.
        tables: As for `find_roots`; so is `links`.

    Raises:
        UserError: A source is missing, unreadable, or contains no image.
    """
    if known := read_listing(work):
        return known
    name = f"listed-{uuid.uuid4().hex[:8]}"
    folder = storage.join(work, name)
    logger.info("listing %s into %s", ", ".join(named), folder)
    listed = _list_by_tasks(find_roots(named, tables, links), folder, shard_size, executor)
    groups = [group for group in listed if group.photographs or group.tars]
    # A table may repeat an image, or name one of another source.
    if any(map(scan.is_table, named)):
        # In a worker, to keep the driver's memory small.
        groups = executor.call(write_unique, folder, groups, shard_size)
    if not groups:
        raise SourceError(
            f"{', '.join(named)} contains no image ({', '.join(locations.IMAGE_SUFFIXES)}); check the path"
        )
    listing = Listing(
        groups=tuple(groups),
        shard_size=shard_size,
        folder=name,
        other_files=sum(group.other_files for group in listed),
        shadowed=sum(group.shadowed for group in listed),
        repeated=sum(group.photographs for group in listed) - sum(group.photographs for group in groups),
    )
    if listing.repeated:
        console.print(f"{listing.repeated:,} rows repeat an image of another row; each image is graded once")
    write_json(storage.join(work, LISTING_FILE), listing.to_json())
    return listing


def find_roots(named: Sequence[str], tables: bool = True, links: bool = True) -> list[Root]:
    """Divide sources into roots that tasks list in parallel; of prepared data, the files of the manifest.

    Args:
        named: Sources to grade.
        tables: Whether they may be tables of uris or prepared data, which name images elsewhere.
        links: Whether links of a local folder may lead out of it; if not, each such link is a failed row.

    Raises:
        UserError: A source is missing, or a table that `tables` does not allow.
    """
    roots: list[Root] = []
    for source in named:
        with storage.rename_errors(source):
            prepared = storage.exists(storage.join(source, manifest.SPEC_FILE))
        if not tables and (prepared or scan.is_table(source)):
            raise UserError(f"{source} names images stored elsewhere, which --no-tables refuses")
        if prepared:
            manifest.read_spec(source)  # refuses another schema version
            files = storage.list_files(storage.join(source, manifest.MANIFEST_FOLDER))
            roots += map(Root, files)
        else:
            roots += scan.divide_source(source, links)
    return roots


def write_groups(folder: str, size: int, number: int, objects: Iterable[dict[str, Any]]) -> Iterator[Listed]:
    """Write the images among listed objects as shards, in groups.

    Args:
        folder: Folder of the listing.
        size: Images per shard.
        number: Number of the task, which distinguishes its groups.
        objects: Rows of `scan.LISTED`.

    Yields:
        Each group; the last one has no shards and counts the files that are not images.
    """
    counts = Listed(f"{number:04d}")
    tars: list[dict[str, Any]] = []
    rows = select_images(objects, counts, tars)
    yield from _write_groups(folder, f"{number:04d}", size, rows)
    for place, chunk in enumerate(batched(tars, GROUP_TARS)):
        group = f"{number:04d}-{place:06d}-tar"
        yield Listed(group, tars=write_group(folder, group, 1, iter(chunk)))
    yield counts


def _write_groups(folder: str, prefix: str, size: int, rows: Iterator[dict[str, Any]]) -> Iterator[Listed]:
    for place in count():
        group = f"{prefix}-{place:06d}"
        if not (images := write_group(folder, group, size, islice(rows, size * GROUP_SHARDS))):
            break
        yield Listed(group, photographs=images)


def select_images(
    objects: Iterable[dict[str, Any]], counts: Listed, tars: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Select the images among listed objects; collect tars, and count the other files."""
    for row in objects:
        code, name = row["code"], row["member"] or row["uri"]
        if code == "shadowed_member":
            counts.shadowed += 1
        elif code == "outside_link":
            yield row  # a failed row: the folder or file behind it is not read
        elif row.get("kind") or locations.is_image_name(name):
            # Labels of tables are not used here.
            yield row | ({"code": None, "error": None} if code == "bad_label" else {})
        elif archives.is_archive(name) and code:
            yield row  # a failed row: it may contain images
        elif archives.is_stream(row["uri"]) and not row["member"]:
            tars.append(row)
        else:
            counts.other_files += 1


def _list_by_tasks(roots: list[Root], folder: str, shard_size: int, executor: Executor) -> list[Listed]:
    groups: list[Listed] = []
    # Without parallel tasks, one: each has a last shard that is smaller.
    parts = split_roots(roots) if executor.uses_ray else [(0, roots)]
    with progress_bar("listing", None) as (progress, bar):
        for listed in executor.map(partial(_list_part, folder, shard_size), parts):
            groups += listed
            progress.update(bar, advance=sum(group.photographs for group in listed))
    return sorted(groups, key=lambda group: group.group)


def _list_part(folder: str, shard_size: int, part: tuple[int, list[Root]]) -> list[Listed]:
    number, roots = part
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        objects = chain.from_iterable(map(scan.list_root, roots))
        return list(write_groups(folder, shard_size, number, objects))


def write_unique(folder: str, groups: list[Listed], shard_size: int) -> list[Listed]:
    """Write new groups without repeated rows, if there are any; the listed groups are not changed."""
    listed = [group for group in groups if group.photographs]
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        if not (repeated := _repeated([listed_file(folder, group.group) for group in listed])):
            return groups
        rows = chain.from_iterable(read_listed_rows(folder, group) for group in listed)
        unique = _write_groups(folder, "unique", shard_size, _first_of(rows, repeated))
        return [*unique, *(group for group in groups if group.tars)]


def _repeated(files: list[str]) -> set[tuple[str, str | None]]:
    """Uri and member of the images that more than one row of the listed groups names."""
    if not files:
        return set()
    with open_duckdb() as connection:
        connection.register("listed", parquet.dataset(files))
        query = "select uri, member from listed group by uri, member having count(*) > 1"
        return set(connection.execute(query).fetchall())


def _first_of(
    rows: Iterable[dict[str, Any]], repeated: set[tuple[str, str | None]]
) -> Iterator[dict[str, Any]]:
    """Rows without the later ones of each repeated image."""
    seen: set[tuple[str, str | None]] = set()
    for row in rows:
        name = (row["uri"], row["member"])
        if name in repeated:
            if name in seen:
                continue
            seen.add(name)
        yield row
