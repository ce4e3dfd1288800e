"""List and read images: files, and members of archives, in a folder or an S3 prefix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from typing import Any

from scalp_core import archives, storage
from scalp_core.archives import Place, Placed
from scalp_core.errors import ImageError, UserError

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")


@dataclass(frozen=True)
class Location:
    """Location of the bytes of one image."""

    uri: str  # file, or archive that holds the image
    member: str | None = None  # name of the entry, if `uri` is an archive
    # Byte range in the archive; None to look the member up by its name
    place: Place | None = field(default=None, compare=False)
    # Expected hash of the bytes, which reading checks; None if unknown
    sha256: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.uri}!{self.member}" if self.member else self.uri


@dataclass
class Listing:
    """Images of a source, and the number of files that are not images by their name."""

    images: list[Location]
    other_files: int = 0


def is_image_name(name: str) -> bool:
    """Whether a file name is the name of an image; hidden files such as `._a.jpg` are not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def list_images(source: str) -> Listing:
    """List the images in a folder, prefix or archive, and in archives inside a folder, by their suffix.

    Raises:
        UserError: the source is missing, unreadable, or has no images.
    """
    source = storage.absolute(source)
    listing = Listing([])
    for uri in storage.list_files(source):
        if archives.is_archive(uri):
            # Of members that share a name only the last can be read.
            names = dict.fromkeys(member.name for member in archives.list_members(uri))
            files = [Location(uri, name) for name in names]
        else:
            files = [Location(uri)]
        kept = [location for location in files if is_image_name(location.member or location.uri)]
        listing.images += kept
        listing.other_files += len(files) - len(kept)
    if not listing.images:
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return listing


LOCATION_COLUMNS = ("uri", "member", "byte_offset", "byte_length", "compression", "sha256")
"""Columns of the manifest with the location of an image."""


def location_of(row: Mapping[str, Any]) -> Location:
    """Return the location in a row of `LOCATION_COLUMNS`; all but `uri` may be missing, null or empty."""
    length = row.get("byte_length")
    place = None
    if length is not None and length >= 0:
        place = Place(int(row["byte_offset"]), int(length), row["compression"])
    return Location(row["uri"], row.get("member") or None, place, row.get("sha256") or None)


def read_images(locations: Sequence[Location], max_bytes: int) -> Iterator[bytes | ImageError]:
    """Read the bytes of each image, in order; an unreadable image yields its error.

    Members of one archive are read fastest next to each other and in the archive's order.
    """
    return (placed.data for placed in read_placed(locations, max_bytes))


def read_placed(locations: Sequence[Location], max_bytes: int) -> Iterator[Placed]:
    """Read images as `read_images` does, with the places of members in their archives."""
    for (uri, read), group in groupby(locations, key=lambda location: (location.uri, _reader(location))):
        chunk = list(group)
        given = 0
        try:
            for location, placed in zip(chunk, read(uri, chunk, max_bytes), strict=True):
                yield placed._replace(data=_checked(placed.data, location))
                given += 1
        except Exception as error:  # a damaged archive raises many types
            yield from [Placed(_failure(error, f"{uri}: " if chunk[0].member else ""))] * (len(chunk) - given)


def _reader(location: Location) -> Callable[[str, Sequence[Location], int], Iterator[Placed]]:
    if location.member is None:
        return _read_files
    return _read_by_name if location.place is None else _read_by_place


def _read_by_name(uri: str, locations: Sequence[Location], max_bytes: int) -> Iterator[Placed]:
    return archives.read_placed(uri, [location.member or "" for location in locations], max_bytes)


def _read_by_place(uri: str, locations: Sequence[Location], max_bytes: int) -> Iterator[Placed]:
    places = [location.place for location in locations if location.place]
    for place, data in zip(places, archives.read_places(uri, places, max_bytes), strict=True):
        yield Placed(data, place)


def _read_files(uri: str, locations: Sequence[Location], max_bytes: int) -> Iterator[Placed]:
    for _ in locations:
        try:
            yield Placed(_read_file(uri, max_bytes))
        except Exception as error:  # fails only this file
            yield Placed(_failure(error))


def _read_file(uri: str, max_bytes: int) -> bytes | ImageError:
    def read() -> bytes | ImageError:
        with storage.open_file(uri) as file:
            size = file.size()
            return archives.too_many_bytes(size, max_bytes) if size > max_bytes else file.read()

    return storage.call_with_retries(uri, read)


def _failure(error: Exception, where: str = "") -> ImageError:
    """Turn an exception on reading one image into an `ImageError` for its row."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    if cause is not None and storage.is_missing(cause):
        return ImageError("not_found", f"{where}it was listed but no longer exists")
    if isinstance(error, UserError):
        return ImageError("fetch_failed" if isinstance(cause, OSError) else "not_found", str(error))
    if isinstance(error, OSError | EOFError):
        return ImageError("fetch_failed", f"{where}{storage.advice(error)}")
    _log.warning("%sreading an image raised %r", where, error, exc_info=error)
    return ImageError("internal_error", f"{where}{type(error).__name__}: {error}")


def _checked(data: bytes | ImageError, location: Location) -> bytes | ImageError:
    if isinstance(data, ImageError) or location.sha256 is None:
        return data
    if location.sha256 == sha256(data).hexdigest():
        return data
    return ImageError("changed", "the file has changed since it was prepared")
