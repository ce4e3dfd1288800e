"""The first step of `scalp grade`: what there is to grade, in shards that are settled before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import ray

from jobs.console import console, progress_bar, read_json, write_json
from jobs.grade_shards import (
    GROUP_SHARDS,
    LISTED,
    PATIENCE_S,
    Listed,
    ListPhotographs,
    listed_file,
    write_groups,
)
from jobs.shards import each, shares
from scalp_core import inventory, manifest, parquet, sources, storage
from scalp_core.errors import SourceError, UserError
from scalp_core.inventory import Root
from scalp_core.progress import LISTING_FILE
from scalp_core.sql import spilling

# Shards below which a group is joined with others.
_CRUMBS = 4
# What is listed at once: a mistyped source is told before Ray is started, and a small one waits for nobody.
_FEW, _GLANCE_S = 10_000, 5.0


@dataclass(frozen=True)
class Listing:
    """What a run grades.

    Args:
        groups: of shards; one more for every few hundred thousand photographs.
        shard_size: photographs of a shard.
        other_files: that are no photograph by their name.
        shadowed: members of archives that share their name with a later one.
        repeated: photographs that the sources name again.
    """

    groups: tuple[Listed, ...]
    shard_size: int
    other_files: int = 0
    shadowed: int = 0
    repeated: int = 0

    @property
    def photographs(self) -> int:
        """Of the listed shards; those in tars are counted when they are read."""
        return sum(group.photographs for group in self.groups)

    @property
    def tars(self) -> int:
        return sum(group.tars for group in self.groups)


def shard_names(group: Listed, shard_size: int) -> list[str]:
    """`GROUP/NNNN` of each shard of a group."""
    return [
        f"{group.group}/{place:04d}" for place in range(group.tars or -(-group.photographs // shard_size))
    ]


def glance(named: Sequence[str], work: str, tables: bool = True) -> list[dict[str, Any]] | None:
    """The objects of small sources, before Ray is started; None where there are many, or a run listed them.

    Args:
        named: as for `list_sources`.
        work: folder of the run.
        tables: as for `roots_of`.

    Raises:
        UserError: a source is missing or unreadable.
    """
    if storage.exists(storage.join(work, LISTING_FILE)):
        return None
    roots = [root for source in named for root in roots_of(source, tables)]
    until = time.monotonic() + _GLANCE_S
    found: list[dict[str, Any]] = []
    for row in chain.from_iterable(map(inventory.list_root, roots)):
        if len(found) == _FEW or time.monotonic() > until:
            return None
        found.append(row)
    return found


def list_sources(
    named: Sequence[str],
    work: str,
    shard_size: int,
    glanced: list[dict[str, Any]] | None,
    tables: bool = True,
) -> Listing:
    """Lists photographs into shards below `work`; what the last run listed, if that came so far.

    Args:
        named: folders, prefixes, archives, tables, and directories that `scalp prepare` wrote.
        work: folder of the run.
        shard_size: photographs of a shard.
        glanced: what `glance` found.
        tables: as for `roots_of`.

    Raises:
        UserError: a source is missing, unreadable, or holds nothing to grade.
    """
    uri = storage.join(work, LISTING_FILE)
    if known := read_json(uri):
        return Listing(**known | {"groups": tuple(Listed(**group) for group in known["groups"])})
    if glanced is None:
        roots = [root for source in named for root in roots_of(source, tables)]
        groups = _without_crumbs(work, _list_by_tasks(roots, work, shard_size), shard_size)
    else:
        groups = list(write_groups(work, shard_size, 0, glanced))
    repeated = _drop_repeated(work, groups, shard_size) if _may_repeat(named) else 0
    listing = Listing(
        groups=tuple(group for group in groups if group.photographs or group.tars),
        shard_size=shard_size,
        other_files=sum(group.other_files for group in groups),
        shadowed=sum(group.shadowed for group in groups),
        repeated=repeated,
    )
    if not listing.groups:
        raise SourceError(
            f"{', '.join(named)} holds no photograph ({', '.join(sources.IMAGE_SUFFIXES)}); check the path"
        )
    write_json(uri, asdict(listing))
    return listing


def _list_by_tasks(roots: list[Root], work: str, shard_size: int) -> list[Listed]:
    groups: list[Listed] = []
    with progress_bar("listing", None) as (progress, bar):
        for row in each(shares(roots)).flat_map(ListPhotographs(work, shard_size)).iter_rows():
            groups.append(Listed(**row))
            progress.update(bar, advance=groups[-1].photographs)
    return sorted(groups, key=lambda group: group.group)


def roots_of(source: str, tables: bool = True) -> list[Root]:
    """The pieces of a source that tasks list beside each other; of prepared data, the manifest's files.

    Args:
        source: one of those that are graded.
        tables: it may be one that names photographs outside of it: a table of uris, or prepared data.

    Raises:
        UserError: it is missing, or one that may not be.
    """
    prepared = storage.exists(storage.join(source, manifest.SPEC_FILE))
    if not tables and (prepared or inventory.is_table(source)):
        raise UserError(f"{source} names photographs that lie elsewhere, which --no-tables refuses")
    if not prepared:
        return inventory.roots(source)
    manifest.read_spec(source)  # refuses what is of another version
    return [Root(uri) for uri in storage.list_files(storage.join(source, manifest.MANIFEST_FOLDER))]


def _without_crumbs(work: str, groups: list[Listed], shard_size: int) -> list[Listed]:
    """Small groups as one: many folders of few photographs would make many shards of few.

    There is at most one a listing task, so these rows are few, however many photographs there are.
    """
    small = [group for group in groups if 0 < group.photographs < _CRUMBS * shard_size]
    if len(small) < 2:
        return groups
    shards = [shard for group in small for shard in shard_names(group, shard_size)]
    table = pa.concat_tables([parquet.read(listed_file(work, shard)) for shard in shards])
    joined = Listed("joined", photographs=table.num_rows)
    for place, shard in enumerate(shard_names(joined, shard_size)):
        rows = table.slice(place * shard_size, shard_size)
        parquet.write(listed_file(work, shard), rows)
    for group in small:
        group.photographs = 0
        storage.remove_folder(storage.join(work, LISTED, group.group))
    return [joined, *groups]


def _may_repeat(named: Sequence[str]) -> bool:
    """Folders and archives hold everything once; a table may name a photograph twice, or another source's."""
    return any(inventory.is_table(source) for source in named)


def _drop_repeated(work: str, groups: list[Listed], shard_size: int) -> int:
    """Keeps the first of the rows that name the same photograph; how many went, and `groups` with that."""
    repeated, left = ray.get(
        _rewrite_without_repeated.remote(work, [asdict(each) for each in groups], shard_size)
    )
    for group in groups:
        group.photographs = left.get(group.group, group.photographs)
    if repeated:
        console.print(f"{repeated:,} rows name a photograph that another row names too; each is graded once")
    return repeated


@ray.remote(num_cpus=1)
def _rewrite_without_repeated(
    work: str, groups: list[dict[str, Any]], shard_size: int
) -> tuple[int, dict[str, int]]:
    """Rewrites the groups that hold repeated rows, in a worker: the driver's memory must not grow."""
    with storage.patience(PATIENCE_S):
        rows = parquet.dataset(storage.join(work, LISTED))
        with spilling() as connection:
            connection.register("listed", rows)
            found = connection.execute(
                "select uri, member, count(*) as times from listed group by uri, member having count(*) > 1"
            ).fetchall()
        again = {(uri, member) for uri, member, _ in found}
        if not again:
            return 0, {}
        seen: set[tuple[str, str | None]] = set()
        left = {}
        for group in groups:
            if group["photographs"]:
                left[group["group"]] = _rewrite(work, Listed(**group), shard_size, again, seen)
    return sum(times - 1 for _, _, times in found), left


def _rewrite(
    work: str,
    group: Listed,
    shard_size: int,
    again: set[tuple[str, str | None]],
    seen: set[tuple[str, str | None]],
) -> int:
    """A group without what was seen before; the photographs that are left in it."""
    files = [storage.join(work, LISTED, f"{shard}.parquet") for shard in shard_names(group, shard_size)]
    kept: list[dict[str, Any]] = []
    for uri in files:
        for row in parquet.read(uri).to_pylist():
            name = (row["uri"], row["member"])
            if name in again and name in seen:
                continue
            seen |= {name} if name in again else set()
            kept.append(row)
    for place in range(min(GROUP_SHARDS, len(files))):
        some = kept[place * shard_size : (place + 1) * shard_size]
        parquet.write(files[place], pa.Table.from_pylist(some, schema=inventory.LISTED))
    return len(kept)
