"""Find the groups of reviewed images in the sources of a bulk run, so that later splits do not leak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from scalp_core import storage
from scalp_core.datasets import manifest, scan, tables
from scalp_core.errors import UserError

Place = tuple[str, str | None]
"""Uri and member of an image."""


def read_groups(sources: Sequence[str], wanted: set[Place], warn: Callable[[str], None]) -> dict[Place, str]:
    """Read the groups of `wanted` images from tables with a column `group` and from prepared data.

    A source that cannot be read any more gives no groups; `warn` gets the reason.
    """
    groups: dict[Place, str] = {}
    for source in sources:
        try:
            for table in _tables_of(source):
                for row in tables.read_rows(table):
                    place = row["uri"], row["member"]
                    if row["group"] is not None and place in wanted:
                        groups[place] = row["group"]
        except UserError as error:
            warn(f"labels get no groups from {source}: {error}")
    return groups


def _tables_of(source: str) -> Iterator[str]:
    if scan.is_table(source):
        files = [source]
    elif storage.exists(storage.join(source, manifest.SPEC_FILE)):
        files = storage.list_files(storage.join(source, manifest.MANIFEST_FOLDER))
    else:
        files = []
    return (file for file in files if "group" in tables.find_columns(file))
