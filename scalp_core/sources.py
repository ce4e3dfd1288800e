"""Photographs wherever they lie: files, and members of archives, in a folder or an S3 prefix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from scalp_core import archives, storage
from scalp_core.errors import ImageError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Location:
    """Where the bytes of one photograph are: `member` names the entry when `uri` is an archive."""

    uri: str
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.uri}!{self.member}" if self.member else self.uri


@dataclass
class Listing:
    """What a source holds: the photographs in it, and how many files were no photograph by their name."""

    photographs: list[Location]
    other_files: int = 0


def is_photograph(name: str) -> bool:
    """Whether a file's name is one of a photograph.

    Files that the operating system leaves behind (`._a.jpg`) are none.
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def list_photographs(source: str) -> Listing:
    """Photographs in a folder, a prefix or an archive (archives inside a folder too), by their file suffix.

    Raises:
        UserError: the source is missing, unreadable, or holds no photograph.
    """
    source = storage.absolute(source)
    listing = Listing([])
    for uri in storage.list_files(source):
        if archives.is_archive(uri):
            # Members that share a name are one: only the last can be read.
            names = dict.fromkeys(member.name for member in archives.list_members(uri))
            found = [Location(uri, name) for name in names]
        else:
            found = [Location(uri)]
        kept = [location for location in found if is_photograph(location.member or location.uri)]
        listing.photographs += kept
        listing.other_files += len(found) - len(kept)
    if not listing.photographs:
        raise UserError(f"{source} holds no photograph ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return listing


def check_disjoint(uris: Sequence[str]) -> None:
    """Refuses sources of which one lies inside another: its photographs would be counted twice.

    Raises:
        UserError: names both.
    """
    given: dict[str, str] = {}
    for uri in uris:
        place = storage.absolute(uri).rstrip("/")
        if place in given:
            raise UserError(f"{given[place]} and {uri} are the same source; name it once")
        given[place] = uri
    for place, uri in given.items():
        for slash in re.finditer("/", place):
            if outer := given.get(place[: slash.start()]):
                raise UserError(f"{uri} lies in {outer}; name {outer} alone, or sources beside each other")


def read_photographs(locations: list[Location], max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of each photograph, in order, or why they cannot be had. One bad one stops nothing.

    Members of one archive are read fastest beside each other and in the archive's order.
    """
    for (uri, is_member), group in groupby(locations, key=lambda each: (each.uri, each.member is not None)):
        same = list(group)
        if not is_member:
            yield from (_read_file(uri, max_bytes) for _ in same)
            continue
        names = [location.member or "" for location in same]
        given = 0
        try:
            for data in archives.read_members(uri, names, max_bytes):
                yield data
                given += 1
        except Exception as error:  # a damaged archive raises many kinds
            yield from [ImageError("fetch_failed", f"{uri}: {storage.advice(error)}")] * (len(same) - given)


def _read_file(uri: str, max_bytes: int) -> bytes | ImageError:
    def read() -> bytes | ImageError:
        with storage.open_file(uri) as file:
            size = file.size()
            return archives.too_many_bytes(size, max_bytes) if size > max_bytes else file.read()

    try:
        return storage.retried(uri, read)
    except FileNotFoundError:
        return ImageError("not_found", "the file was listed but is not there")
    except OSError as error:
        return ImageError("fetch_failed", storage.advice(error))
