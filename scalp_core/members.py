"""What zips and tars have in common: a member, its name, and why it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from scalp_core.errors import ImageError
from scalp_core.storage_errors import ArchiveError

# An archive that is kept open takes 0.8 KiB of memory for each.
MAX_MEMBERS = 2_000_000


class Member(NamedTuple):
    """One entry of an archive; `size` in bytes, as the archive claims."""

    name: str
    size: int


class Archive(Protocol):
    """An archive that is kept open, because opening means reading its table of contents.

    Args:
        held: members that it keeps in memory.
    """

    held: int

    def members(self) -> list[Member]:
        """All members in the order of the archive.

        Raises:
            ArchiveError: it cannot be read to its end.
        """
        ...

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
        """The bytes of each member, in order, or why they cannot be had."""
        ...


def decoded(name: bytes) -> str:
    """A name that does not say its encoding: macOS writes UTF-8, Korean Windows cp949."""
    for encoding in ("utf-8", "cp949"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("cp437")  # a sign for every byte


def too_many_bytes(size: int, max_bytes: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes; the limit is {max_bytes:,}")


def too_many_members(limit: int = MAX_MEMBERS) -> ArchiveError:
    return ArchiveError(f"it holds more than {limit:,} members; divide it")


def no_member() -> ImageError:
    return ImageError("not_found", "the archive has no such member")


def unreadable(reason: object) -> ImageError:
    return ImageError("fetch_failed", f"the archive member cannot be read: {reason}")
