"""Malformed and hostile zips and tars, built byte by byte."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from random import Random

Files = Iterable[tuple[str, bytes]]


def zip_of(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


def entry(
    name: bytes,
    *,
    size: int = 0,
    packed: int = 0,
    crc: int = 0,
    offset: int = 0,
    method: int = 8,
    flags: int = 0,
    version: int = 20,
    extra: bytes = b"",
) -> bytes:
    """Build one entry of a zip's table of contents."""
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2", version, version, flags, method, 0, 33, crc, packed, size,
            len(name), len(extra), 0, 0, 0, 0, offset,
        )
        + name
        + extra
    )  # fmt: skip


def local(name: bytes, data: bytes, *, size: int, crc: int, method: int = 8, flags: int = 0) -> bytes:
    """Build the local header and data of a zip member."""
    header = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 20, flags, method, 0, 33, crc, len(data), size, len(name), 0
    )
    return header + name + data


def table(entries: bytes, at: int, *, count: int = 1, claims: int | None = None) -> bytes:
    """Build a zip's table of contents and its end; `claims` is the size of the table in the end record."""
    size = len(entries) if claims is None else claims
    return entries + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, at, 0)


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(data) + packer.flush()


def one_member(
    name: bytes, data: bytes, packed: bytes, method: int = 8, flags: int = 0, **lies: int
) -> bytes:
    """Build a zip of one member, whose table may be false."""
    about = {"size": len(data), "crc": zlib.crc32(data)} | lies
    body = local(name, packed, method=method, flags=flags, size=about["size"], crc=about["crc"])
    return body + table(entry(name, packed=len(packed), method=method, flags=flags, **about), len(body))


def overlapping_zip(members: int, kernel: bytes) -> bytes:
    """Build a zip bomb: the entries of all members refer to the same bytes."""
    packed, crc = deflated(kernel), zlib.crc32(kernel)
    body = local(b"0.jpg", packed, size=len(kernel), crc=crc)
    entries = entry(b"0.jpg", size=len(kernel), packed=len(packed), crc=crc) * members
    return body + table(entries, len(body), count=members)


def zip64(name: bytes, data: bytes, *, claims: int) -> bytes:
    """A zip whose 64-bit fields claim a size of the member."""
    body = local(name, data, size=0xFFFFFFFF, crc=zlib.crc32(data), method=0)
    extra = struct.pack("<HHQ", 1, 8, claims)
    entries = entry(name, size=0xFFFFFFFF, packed=len(data), crc=zlib.crc32(data), method=0, extra=extra)
    return body + table(entries, len(body))


def zip64_end(table_bytes: int, offset: int, padding: int = 0) -> bytes:
    """A zip of nothing whose 64-bit end claims a table of that size, at that offset."""
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, table_bytes, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, padding, 1)
    return bytes(padding) + record + locator + table(b"", 0xFFFFFFFF, claims=0xFFFFFFFF, count=0xFFFF)


def tar_of(files: Files, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_header(name: bytes, size: int, kind: bytes = b"0", *, link: bytes = b"") -> bytes:
    """512 bytes with a true checksum; a size that octal cannot hold is written in base 256."""
    if 0 <= size < 8**11:
        number = b"%011o\0" % size
    else:
        number = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=size < 0)
    fields = [
        name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", number, b"0" * 11 + b"\0",
        b" " * 8, kind, link.ljust(100, b"\0"), b"ustar\0" + b"00",
    ]  # fmt: skip
    header = b"".join(fields).ljust(512, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def tar_entry(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return tar_header(name, len(data), kind) + data + bytes(-len(data) % 512)


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while length != len(b"%d" % length) + len(key) + len(value) + 3:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


END = bytes(1024)
PACKERS = {".tar": bytes, ".tar.gz": gzip.compress}


def mutated(data: bytes, chance: Random) -> bytes:
    """Damage `data` in one to eight places: bits, numbers, missing or inserted bytes."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(damaged))
        match chance.randrange(5):
            case 0:
                damaged[place] ^= 1 << chance.randrange(8)
            case 1:
                damaged[place : place + 4] = chance.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff"))
            case 2:
                damaged[place : place + 12] = chance.choice((b"7" * 12, b"\xff" * 12, b"\x80" + b"\xff" * 11))
            case 3:
                del damaged[place : place + chance.choice((1, 4, 20))]
            case _:
                damaged[place:place] = damaged[chance.randrange(len(damaged)) :][: chance.randrange(1, 600)]
    return bytes(damaged)
