"""Hostile, damaged and unusual compression of tars."""

import bz2
import gzip
import lzma

import pytest

from scalp_core import archives
from scalp_core.archives import byte_ranges
from tests.scalp_core.archives.test_hostile_archives import (
    END,
    FILES,
    GOOD,
    LIMIT,
    TAR,
    examined,
    measured,
    read_one,
    refused,
    streamed,
)
from tests.support import odd_archives as odd


def test_several_packed_files_in_one_are_one(put):
    parts = [gzip.compress(TAR[start : start + 999]) for start in range(0, len(TAR), 999)]
    for between in (b"", bytes(4)):
        assert streamed(put("a.tar.gz", between.join(parts))) == (FILES, None)
    assert streamed(put("b.tar.gz", b"".join(parts) + bytes(5000))) == (FILES, None)
    found, error = streamed(put("c.tar.gz", gzip.compress(TAR) + b"garbage"))
    assert found == FILES
    assert "other data follow" in error


def test_a_packed_bomb_is_not_read_on(put, monkeypatch):
    monkeypatch.setattr(byte_ranges, "_RATIO_WINDOW", 2**22)
    bomb = odd.tar_header(b"2.jpg", 2**25) + bytes(2**25) + END
    uri = put("a.tar.gz", gzip.compress(GOOD + bomb))
    (found, error), mib = measured(streamed, uri)
    assert mib < 20
    assert found[0] == ("1.jpg", b"good")
    assert "decompression bomb" in error


def test_what_is_large_and_not_wanted_is_unpacked_in_little_memory(put):
    files = [("large.jpg", bytes(2**25)), *FILES, ("notes.txt", b"x")]
    uri = put("a.tar.gz", gzip.compress(odd.tar_of(files)))
    stream = archives.stream_members(uri, LIMIT, wanted=lambda name: name.endswith(".jpg"))
    found, mib = measured(list, stream)
    assert mib < 2
    (large, first), *rest, (_, last) = found
    assert (large.name, first.code) == ("large.jpg", "too_many_bytes")
    assert [data for _, data in rest] == list(dict(FILES).values())
    assert last is None


ZSTD = b"\x28\xb5\x2f\xfd" + bytes(99)
REFUSED_TARS = {
    "a.tar.bz2": ("bzip2", bz2.compress(TAR)),
    "a.TBZ2": ("bzip2", bz2.compress(TAR)),
    "a.tar.xz": ("xz", lzma.compress(TAR)),
    "a.txz": ("xz", lzma.compress(TAR)),
    "a.tar.zst": ("zstd", ZSTD),
    "a.tgz": ("bzip2", bz2.compress(TAR)),  # by its content, whatever its name
}


@pytest.mark.parametrize("name", REFUSED_TARS)
def test_another_compression_is_refused_with_the_way_out(put, name):
    kind, data = REFUSED_TARS[name]
    uri = put(name, data)
    expected = f"it is compressed by {kind}, which is not read; unpack it, or repack it as .tar or .tar.gz"
    assert refused(uri).endswith(expected)
    assert streamed(uri) == ([], f"cannot read {uri}: {expected}")
    assert expected in read_one(uri, "1.jpg").message
    assert [(row["code"], row["member"]) for row in examined(uri)] == [("bad_archive", None)]


def test_a_tar_whose_first_name_begins_like_bzip2_is_read(put):
    files = [("BZh9.jpg", b"x")]
    assert streamed(put("a.tar", odd.tar_of(files))) == (files, None)


def test_a_wrong_suffix_is_told_or_does_not_matter(put):
    for name, data in (("a.tar", gzip.compress(TAR)), ("a.tar.gz", TAR), ("a.tar.xz", TAR)):
        uri = put(name, data)
        assert streamed(uri) == (FILES, None)
        assert read_one(uri, "3.jpg") == dict(FILES)["3.jpg"]
    for name in ("b.tar", "b.tar.gz"):
        assert refused(put(name, odd.zip_of(FILES))).endswith("rename it to end in .zip")
