"""Members of `.zip`, `.tar` and `.tar.gz` archives, read where they lie, local or in S3; never extracted.

A zip and a plain tar are read by range: one member costs its own bytes. A compressed tar can only be read
from its beginning, so it is read once, onwards, as long as members are asked for in its order. Members' names
are labels and are never used as paths; links and devices are no members.
"""

from __future__ import annotations

import io
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from scalp_core import storage
from scalp_core.errors import ImageError

ZIP_SUFFIX = ".zip"
TAR_SUFFIX = ".tar"
COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SUFFIXES = (ZIP_SUFFIX, TAR_SUFFIX, *COMPRESSED_TAR_SUFFIXES)

# A member is one request to S3 where it fits into this, and not three.
_BUFFER = 2**17
_OPEN_ARCHIVES = 8
_UTF8_FLAG = 0x800


class Member(NamedTuple):
    """One entry of an archive; `size` in bytes, as the archive claims."""

    name: str
    size: int


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_stream(uri: str) -> bool:
    """Whether an archive has no table of contents, so that listing it means reading it."""
    return is_archive(uri) and not uri.lower().endswith(ZIP_SUFFIX)


def list_members(uri: str) -> list[Member]:
    """All members in the order of the archive; of those that share a name only the last can be read.

    Raises:
        UserError: it is missing, damaged or no archive.
    """
    with storage.explained(uri):
        return storage.retried(uri, _opened, uri).members()


def stream(uri: str, max_bytes: int) -> Iterator[tuple[Member, bytes | ImageError]]:
    """All members of a tar in one pass, in its order, each with its bytes or why they cannot be had.

    Raises:
        UserError: the archive cannot be opened, or is damaged from here on.
    """
    with storage.explained(uri):
        for entry, archive in _stream(uri):
            yield Member(_tar_name(entry), entry.size), _read_entry(archive, entry, max_bytes)


def read_members(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of each member, in order, or why they cannot be had; one in memory at a time.

    Raises:
        OSError: the archive itself cannot be read; as zipfile and tarfile, when it is damaged or none.
    """
    yield from storage.retried(uri, _opened, uri).read(names, max_bytes)


class _Archive(Protocol):
    """An archive that is kept open, because opening means reading its table of contents."""

    def members(self) -> list[Member]: ...

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]: ...


class _OpenArchives:
    """The archives that this process read last, by uri, size and time of change."""

    def __init__(self) -> None:
        self._archives: OrderedDict[tuple[str, int, int], _Archive] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str) -> _Archive:
        fs, path = storage.filesystem(uri)
        info = fs.get_file_info(path)
        key = (uri, info.size or 0, info.mtime_ns or 0)
        with self._lock:
            archive = self._archives.get(key)
        if archive is None:
            archive = _open(uri)  # takes requests: threads open several beside each other
        with self._lock:
            self._archives[key] = archive
            self._archives.move_to_end(key)
            if len(self._archives) > _OPEN_ARCHIVES:
                self._archives.popitem(last=False)
        return archive


_open_archives = _OpenArchives()


def _opened(uri: str) -> _Archive:
    return _open_archives.get(uri)


def _open(uri: str) -> _Archive:
    lower = uri.lower()
    if lower.endswith(ZIP_SUFFIX):
        return _Zip(uri)
    return _Tar(uri) if lower.endswith(TAR_SUFFIX) else _CompressedTar(uri)


class _Zip:
    """Its table of contents is read once, then each member by range."""

    def __init__(self, uri: str) -> None:
        self._archive = zipfile.ZipFile(io.BufferedReader(_Raw(uri), _BUFFER))
        files = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = [Member(_zip_name(info), info.file_size) for info in files]
        self._infos = dict(zip((member.name for member in self._members), files, strict=True))

    def members(self) -> list[Member]:
        return self._members

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
        for name in names:
            try:
                info = self._infos[name]
                if info.file_size > max_bytes:
                    yield too_many_bytes(info.file_size, max_bytes)
                    continue
                with self._archive.open(info) as file:
                    data = file.read(max_bytes + 1)  # the declared size is not trusted
                yield too_many_bytes(len(data), max_bytes) if len(data) > max_bytes else data
            except KeyError:
                yield _no_member()
            except Exception as error:  # zipfile raises many kinds for a damaged or encrypted member
                if storage.is_transient(error):
                    raise
                yield _unreadable(error)


class _Tar:
    """A plain tar: its headers are walked once, then each member is read by range."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file = storage.open_file(uri)
        buffered = io.BufferedReader(_Raw(uri), _BUFFER)
        with tarfile.open(fileobj=buffered, mode="r:") as archive:
            files = [entry for entry in archive if entry.isreg()]
        self._members = [Member(_tar_name(entry), entry.size) for entry in files]
        self._offsets = {_tar_name(entry): (entry.offset_data, entry.size) for entry in files}

    def members(self) -> list[Member]:
        return self._members

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
        for name in names:
            offset, size = self._offsets.get(name, (0, -1))
            if size < 0:
                yield _no_member()
            elif size > max_bytes:
                yield too_many_bytes(size, max_bytes)
            else:
                data = storage.retried(self._uri, self._file.read_at, size, offset)
                yield data if len(data) == size else _unreadable("the archive ends before it does")


class _CompressedTar:
    """Goes on from the member that was read last; from the beginning for one that lies before it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._position: Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]] = iter(())
        self._damage: Exception | None = None
        self._lock = threading.Lock()

    def members(self) -> list[Member]:
        return [Member(_tar_name(entry), entry.size) for entry, _ in _stream(self._uri)]

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
        with self._lock:
            found = self._find(set(names), max_bytes)
            missing = _unreadable(self._damage) if self._damage else _no_member()
        for name in names:
            yield found.get(name, missing)

    def _find(self, wanted: set[str], max_bytes: int) -> dict[str, bytes | ImageError]:
        found: dict[str, bytes | ImageError] = {}
        for again in (False, True):
            if again:
                self._position = _stream(self._uri)
            try:
                for entry, archive in self._position:
                    if (name := _tar_name(entry)) in wanted:
                        found[name] = _read_entry(archive, entry, max_bytes)
                        if len(found) == len(wanted):
                            return found
            except Exception as error:  # gzip and tarfile raise many kinds; what lies before can be read
                if storage.is_transient(error):
                    raise
                self._damage = error
        return found


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Without the flag that says UTF-8, a name is what its packer writes: macOS UTF-8, Windows cp949."""
    if info.flag_bits & _UTF8_FLAG:
        return info.filename
    return _decoded(info.filename.encode("cp437"))


def _tar_name(entry: tarfile.TarInfo) -> str:
    return _decoded(entry.name.encode("utf-8", "surrogateescape"))


def _decoded(name: bytes) -> str:
    for encoding in ("utf-8", "cp949"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("cp437")  # a sign for every byte


def _stream(uri: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Regular files of a tar from its beginning; each must be read before the next is asked for."""
    with (
        io.BufferedReader(_Raw(uri), 2**20) as file,
        tarfile.open(fileobj=file, mode="r|*") as archive,
    ):
        for entry in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if entry.isreg():
                yield entry, archive


def _read_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, max_bytes: int) -> bytes | ImageError:
    if entry.size > max_bytes:
        return too_many_bytes(entry.size, max_bytes)
    file = archive.extractfile(entry)
    return file.read() if file else _no_member()


class _Raw(io.RawIOBase):
    """A pyarrow file as Python's own readers take it; a read waits for a server that is away."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file = storage.open_file(uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._file.tell()

        def attempt() -> bytes:
            self._file.seek(start)
            return self._file.read(len(buffer))

        data = storage.retried(self._uri, attempt)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def too_many_bytes(size: int, max_bytes: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes; the limit is {max_bytes:,}")


def _no_member() -> ImageError:
    return ImageError("not_found", "the archive has no such member")


def _unreadable(error: object) -> ImageError:
    return ImageError("fetch_failed", f"the archive member cannot be read: {error}")
