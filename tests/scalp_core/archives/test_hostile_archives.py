"""Hostile, damaged and unusual archives: read, or refused in one line, at bounded cost."""

import bz2
import gzip
import random
import struct
import time
import tracemalloc
import zipfile
import zlib

import pyarrow as pa
import pytest

from scalp_core import archives
from scalp_core.archives import tars, zips
from scalp_core.datasets import examination, scan
from scalp_core.errors import ImageError, UserError
from tests.support import odd_archives as odd

LIMIT = 2**20
FILES = [(f"{index}.jpg", bytes([index]) * 700) for index in range(1, 6)]
END = odd.END
TAR = odd.tar_of(FILES)


def read(uri, *names):
    return [placed.data for placed in archives.read_placed(uri, names, LIMIT)]


def read_one(uri, name):
    (data,) = read(uri, name)
    return data


def listed(uri):
    return list(archives.list_members(uri))


def streamed(uri):
    """Members of a tar in one pass, and its error in one line, or None."""
    found = []
    try:
        for member, data in archives.stream_members(uri, LIMIT):
            found.append((member.name, data))
    except UserError as error:
        return found, one_line(error, uri)
    return found, None


def refused(uri):
    with pytest.raises(UserError) as raised:
        list(archives.list_members(uri))
    return one_line(raised.value, uri)


def one_line(error, uri):
    assert str(error).startswith(f"cannot read {uri}: ")
    assert "\n" not in str(error)
    return str(error)


def measured(work, *arguments):
    """Result of a call, and its peak memory in MiB."""
    tracemalloc.start()
    try:
        return work(*arguments), tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def examined(uri):
    rows = list(scan.list_root(scan.Root(uri), open_tars=True))
    rows = pa.Table.from_pylist(rows, schema=scan.LISTED).to_pylist()
    return pa.concat_tables(examination.examine(rows, examination.Examination(""))).to_pylist()


# Zips


@pytest.mark.parametrize(
    ("data", "code", "expected"),
    [
        (odd.overlapping_zip(1000, bytes(10**6)), "fetch_failed", "overlaps another member; pack it again"),
        (odd.one_member(b"0.jpg", b"x", b"x", method=0, flags=1), "fetch_failed", "without a password"),
        (odd.one_member(b"0.jpg", b"x", b"x", method=0, flags=0x40), "fetch_failed", "without a password"),
        (odd.one_member(b"0.jpg", b"x", b"x", method=9), "fetch_failed", "pack it with deflate"),
        (odd.one_member(b"0.jpg", b"x", b"x", method=199), "fetch_failed", "pack it with deflate"),
        (odd.one_member(b"0.jpg", b"x" * 99, odd.deflated(b"x" * 99), crc=1), "fetch_failed", "Bad CRC-32"),
        (odd.one_member(b"0.jpg", b"x" * 99, odd.deflated(b"x" * 99), size=50), "fetch_failed", "Bad CRC-32"),
        (odd.one_member(b"0.jpg", b"x" * 99, b"\xff" * 20), "fetch_failed", "fetch it again"),
        (odd.one_member(b"0.jpg", b"", bytes(LIMIT + 1), method=0), "too_many_bytes", "limit"),
        (odd.zip_of([("0.jpg", bytes(9 * LIMIT))]), "too_many_bytes", "limit"),
        (odd.zip64(b"0.jpg", b"x", claims=2**64 - 1), "too_many_bytes", "limit"),
        (odd.zip64(b"0.jpg", b"x", claims=LIMIT), None, b"x"),  # less than it says, and sound
    ],
)  # fmt: skip
def test_a_member_of_a_zip_that_lies_is_refused_alone(put, data, code, expected):
    uri = put("a.zip", data)
    found = read_one(uri, "0.jpg")
    if code is None:
        assert found == expected
        return
    assert found.code == code
    assert expected in found.message
    (row, *_) = [row for row in examined(uri) if row["code"] != "shadowed_member"]
    assert row["member"] == "0.jpg"


@pytest.mark.parametrize(
    ("method", "pack", "mib"),
    [(8, odd.deflated, 1), (zipfile.ZIP_BZIP2, bz2.compress, 24), (zipfile.ZIP_LZMA, None, 40)],
)
def test_a_bomb_that_claims_few_bytes_costs_little(put, method, pack, mib):
    bomb = bytes(10**7)
    if pack:
        data = odd.one_member(b"0.jpg", bomb, pack(bomb), method=method, size=100)
    else:
        sound = odd.zip_of([("0.jpg", bomb)], method)
        data = sound.replace(struct.pack("<I", len(bomb)), struct.pack("<I", 100))
    uri = put("a.zip", data)
    found, taken = measured(read_one, uri, "0.jpg")
    assert found.code == "fetch_failed"
    assert taken < mib


def test_an_entry_that_points_elsewhere_is_refused_alone(put):
    body = odd.local(b"0.jpg", b"x", size=1, crc=zlib.crc32(b"x"), method=0)
    for offset in (1, len(body) + 5, 2**31):
        entry = odd.entry(b"0.jpg", size=1, packed=1, crc=zlib.crc32(b"x"), method=0, offset=offset)
        assert read_one(put("a.zip", body + odd.table(entry, len(body))), "0.jpg").code == "fetch_failed"
    before = odd.entry(b"0.jpg", size=1, packed=1, method=0)
    lying = odd.table(before, len(body) + 7)  # all offsets come out below 0
    assert read_one(put("b.zip", body + lying), "0.jpg").code == "fetch_failed"


def test_a_table_of_contents_that_would_fill_the_memory_is_not_read(put, monkeypatch):
    monkeypatch.setattr(zips, "MAX_TABLE_BYTES", 200)
    assert "the limit is 200" in refused(put("a.zip", odd.zip_of(FILES)))


@pytest.mark.parametrize("suffix", [".zip", *odd.PACKERS])
def test_members_that_would_fill_the_memory_are_not_listed(put, monkeypatch, suffix):
    monkeypatch.setattr(zips if suffix == ".zip" else tars, "MAX_MEMBERS", 4)
    uri = put(f"a{suffix}", odd.zip_of(FILES) if suffix == ".zip" else odd.PACKERS[suffix](TAR))
    assert "members; divide it" in refused(uri)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (odd.zip64_end(2**40, 0, padding=4096), "fetch it again"),
        (odd.zip64_end(100, 2**62), "fetch it again"),
        (odd.table(odd.entry(b"0.jpg", version=99), 0), "pack it again"),
        (odd.table(odd.entry(b"\xff.jpg", flags=0x800), 0), "pack it again"),
        (odd.table(odd.entry(b"0.jpg", size=2**32 - 1, extra=b"\1\0\x99\0x"), 0), "fetch it again"),
        (odd.zip_of(FILES)[:-30], "so it is probably truncated; fetch it again"),
        (b"", "fetch it again"),
        (b"no zip at all", "fetch it again"),
        (TAR, "rename it to .tar"),
        (gzip.compress(TAR), "rename it to .tar"),
    ],
)  # fmt: skip
def test_a_zip_whose_table_cannot_be_read_is_refused_in_one_line(put, data, expected):
    assert expected in refused(put("a.zip", data))


def test_what_has_no_name_is_no_member(put):
    sound = odd.zip_of([("1.jpg", b"good"), ("2.jpg", b"x")])
    nameless = sound.replace(b"2.jpg", b"\0.jpg")
    assert [member.name for member in archives.list_members(put("a.zip", nameless))] == ["1.jpg"]
    assert streamed(put("a.tar", GOOD + odd.tar_entry(b"", b"x") + END)) == ([("1.jpg", b"good")], None)


def test_what_is_around_a_zip_does_not_matter(put):
    sound = odd.zip_of(FILES)
    for name, data in (("before.zip", b"#!/bin/sh\n" * 50 + sound), ("behind.zip", sound + b"tail" * 50)):
        assert read(put(name, data), *dict(FILES)) == list(dict(FILES).values())


def test_damage_in_one_member_leaves_the_others(put):
    data = bytearray(odd.zip_of(FILES, zipfile.ZIP_STORED))
    data[data.index(b"2.jpg") - 30] ^= 0xFF  # the mark of its local header
    data[data.index(b"\4" * 700) + 99] ^= 0xFF
    found = read(put("a.zip", bytes(data)), *dict(FILES))
    assert [isinstance(each, bytes) for each in found] == [True, False, True, False, True]
    assert all("fetch it again" in found[index].message for index in (1, 3))


def test_a_zip_cut_anywhere_is_told(put):
    sound = odd.zip_of(FILES)
    for size in range(0, len(sound) - 1, 37):
        assert "fetch it again" in refused(put(f"{size}.zip", sound[:size]))


# Tars


def pax(*records):
    return odd.tar_entry(b"pax", b"".join(records), b"x")


GOOD = odd.tar_entry(b"1.jpg", b"good")
NEXT = odd.tar_header(b"2.jpg", 0)
REFUSED = "the archive is refused"
BROKEN_TARS = {
    "negative size": (odd.tar_header(b"2.jpg", -1024), "damaged"),
    "negative size in pax": (pax(odd.pax_record(b"size", b"-1024")) + NEXT, "damaged"),
    "no number in pax": (pax(odd.pax_record(b"GNU.sparse.size", b"x")) + NEXT, "damaged"),
    "sizes beyond all files": (odd.tar_header(b"2.jpg", 2**80), "damaged"),
    "size beyond this file": (odd.tar_header(b"2.jpg", 2**40), "truncated"),
    "pax header of a gigabyte": (odd.tar_header(b"p", 2**30, b"x") + bytes(4096), REFUSED),
    "name of a gigabyte": (odd.tar_header(b"p", 2**30, b"L") + bytes(4096), REFUSED),
    "headers without end": (odd.tar_entry(b"p", b"x\0", b"L") * 5000, "damaged"),
    "records that do not follow": (pax(b"9 a=b\n" * 1000) + NEXT, "pax header is damaged"),
    "records of nothing": (pax(b"0 a=b\n" * 1000) + NEXT, "pax header is damaged"),
    "record without equals": (pax(b"5 abc" * 100_000) + NEXT, "pax header is damaged"),
    "number of many digits": (pax(odd.pax_record(b"mtime", b"1" * 500_000)) + NEXT, "255 digits"),
    "wrong checksum": (b"2.jpg" + odd.tar_header(b"2.jpg", 5)[5:].replace(b"0005", b"0006"), "damaged"),
    "text": (b"text" * 400, "damaged"),
}


@pytest.mark.parametrize("packer", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", BROKEN_TARS)
def test_what_lies_before_the_damage_of_a_tar_is_read_and_the_damage_told(put, kind, packer):
    bad, expected = BROKEN_TARS[kind]
    uri = put(f"a{packer}", odd.PACKERS[packer](GOOD + bad + odd.tar_entry(b"3.jpg", b"behind") + END))
    started = time.process_time()
    found, error = streamed(uri)
    assert found[0] == ("1.jpg", b"good")
    assert expected in error
    first, last = read(uri, "1.jpg", "none.jpg")
    assert first == b"good"
    assert last.code == "fetch_failed"  # it may be one of those behind
    assert expected in refused(uri)
    assert time.process_time() - started < 3
    assert {row["code"] for row in examined(uri)} >= {"bad_archive"}


def test_files_with_holes_are_refused_and_those_behind_are_read(put):
    old = bytearray(odd.tar_header(b"2.jpg", 0, b"S"))
    old[257:265] = b"ustar  \0"
    old[483:495] = b"%011o\0" % 2**32  # the size with its holes
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    records = [(b"major", b"1"), (b"minor", b"0"), (b"realsize", b"99999999999"), (b"name", b"2.jpg")]
    new = pax(*(odd.pax_record(b"GNU.sparse." + key, value) for key, value in records))
    new += odd.tar_entry(b"2.jpg", b"0\n".ljust(512, b"\0"))
    for holes in (bytes(old), new):
        found, error = streamed(put("a.tar", holes + odd.tar_entry(b"3.jpg", b"behind") + END))
        assert error is None
        assert found[0][1].message.endswith("pack it without --sparse")
        assert found[1] == ("3.jpg", b"behind")


def test_links_devices_and_folders_are_no_members(put):
    others = b"".join(odd.tar_header(b"%s.jpg" % kind, 0, kind, link=b"/etc/passwd") for kind in (b"1", b"2"))
    others += b"".join(odd.tar_header(b"%s.jpg" % kind, 0, kind) for kind in (b"3", b"4", b"5", b"6"))
    assert streamed(put("a.tar", others + GOOD + END)) == ([("1.jpg", b"good")], None)


def test_headers_for_all_that_follows_do_not_add_up(put):
    header = odd.tar_entry(b"g", odd.pax_record(b"comment", b"x" * 50_000), b"g")
    many = b"".join(header + odd.tar_entry(b"%d.jpg" % index, b"x") for index in range(200)) + END
    uri = put("a.tar.gz", gzip.compress(many))
    (found, error), mib = measured(streamed, uri)
    assert (len(found), error) == (200, None)
    assert mib < 12


@pytest.mark.parametrize("suffix", odd.PACKERS)
def test_a_tar_cut_anywhere_gives_what_lies_before_and_is_told(put, suffix):
    files = [(name, random.Random(name).randbytes(700)) for name, _ in FILES]
    sound = odd.PACKERS[suffix](odd.tar_of(files))
    whole = 0
    for size in range(0, len(sound), max(1, len(sound) // 60)):
        found, error = streamed(put(f"{size}{suffix}", sound[:size]))
        assert found == files[: len(found)]
        assert error is not None or len(found) == len(files)
        if error:
            assert "fetch it again" in error or "truncated" in error
        whole += len(found)
    assert whole > 60  # of 60 times 5


@pytest.mark.parametrize("suffix", odd.PACKERS)
def test_what_follows_the_end_of_a_tar_is_told(put, suffix):
    found, error = streamed(put(f"a{suffix}", odd.PACKERS[suffix](TAR + TAR)))
    assert found == FILES
    assert "separate them" in error


# All of them


@pytest.mark.parametrize("suffix", [".zip", *odd.PACKERS])
def test_names_are_labels_and_nothing_is_written(put, tmp_path, suffix):
    names = ["../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a//./b.jpg", "미세각질.jpg", "x" * 5000 + ".jpg"]
    files = [(name, b"%d" % index) for index, name in enumerate(names)]
    data = odd.zip_of(files) if suffix == ".zip" else odd.PACKERS[suffix](odd.tar_of(files))
    uri = put(f"a{suffix}", data)
    if suffix == ".zip":  # old .NET separates folders so
        names[2] = "C:/x.jpg"
    assert [member.name for member in archives.list_members(uri)] == names
    assert read(uri, *names) == [data for _, data in files]
    assert [row["member"] for row in examined(uri)] == (names if suffix != ".tar.gz" else [None])
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


SOUND = {
    "deflated.zip": odd.zip_of(FILES),
    "stored.zip": odd.zip_of(FILES, zipfile.ZIP_STORED),
    "bzip2.zip": odd.zip_of(FILES, zipfile.ZIP_BZIP2),
    "pax.tar": odd.tar_of([("미" * 90 + ".jpg", b"x"), *FILES]),
    "gnu.tar": odd.tar_of([("y" * 200 + ".jpg", b"x"), *FILES], tars.tarfile.GNU_FORMAT),
    **{f"a{suffix}": pack(TAR) for suffix, pack in odd.PACKERS.items() if suffix != ".tar"},
}


@pytest.mark.medium
def test_no_damage_raises_what_is_not_expected(put):
    chance = random.Random(7)
    names = [*dict(FILES), "none.jpg"]
    read_on = 0
    for number in range(400):
        name = chance.choice(list(SOUND))
        uri = put(f"{number}-{name}", odd.mutated(SOUND[name], chance))
        started = time.process_time()
        for work in (lambda uri: read(uri, *names), listed, streamed, examined):
            if work is streamed and name.endswith(".zip"):
                continue
            try:
                found = work(uri)
            except (UserError, OSError) as error:
                assert "\n" not in str(error), name
            else:
                read_on += work is examined and len(found)
        assert time.process_time() - started < 3, name
    assert read_on > 400
    assert all(isinstance(each, bytes | ImageError) for each in read(uri, *names))


@pytest.mark.medium
def test_a_tar_is_examined_in_little_memory_and_ends_at_the_limit_of_members(put, monkeypatch):
    uri = put("many.tar", odd.tar_of((f"{index}.txt", b"") for index in range(4000)))
    rows = [row | {"kind": None} for row in scan.list_root(scan.Root(uri), open_tars=True)]

    def count():
        return sum(table.num_rows for table in examination.examine(rows, examination.Examination("")))

    count()
    found, taken = measured(count)
    assert found == 4000
    assert taken < 5  # 2 KB per member were 8
    monkeypatch.setattr(tars, "MAX_MEMBERS", 100)
    members, error = streamed(uri)
    assert len(members) == 100
    assert "more than" in error
