"""How archives are read: few requests, beside each other, in bounded memory; again where S3 was away."""

import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from scalp_core import archives, inventory, sources, storage, streams
from scalp_core.errors import UserError
from scalp_core.sources import Location
from scalp_core.storage_errors import StorageError
from tests import odd_archives as odd

FILES = {f"{index:03d}.jpg": b"%d" % index * 9_000 for index in range(199)} | {"empty.jpg": b""}
PACK = {
    ".zip": odd.zip_of,
    ".tar": odd.tar_of,
    ".tar.gz": lambda files: gzip.compress(odd.tar_of(files)),
}
LIMIT = 2**20


class Counted:
    """A file that tells of its requests; `away` is what the first of them raise."""

    def __init__(self, size, away=()):
        self.requests = []
        self.at_once = self.most_at_once = 0
        self._size = size
        self._away = list(away)
        self._lock = threading.Lock()

    def read_at(self, size, offset):
        with self._lock:
            self.requests.append((offset, size))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            error = self._away.pop() if self._away else None
        time.sleep(0.002)
        with self._lock:
            self.at_once -= 1
        if error:
            raise error
        return content(offset, min(offset + size, self._size))


def content(begin, end):
    return bytes(place // 1000 % 251 for place in range(begin, end))


def test_neighbours_come_by_one_request():
    file = Counted(10**6)
    ranges = [(begin, begin + 1000) for begin in range(0, 64_000, 1000)]
    ranges += [(70_000, 70_010)]  # a small gap
    ranges += [(900_000, 900_010), (5, 9), (5, 9), (999_999, 1_000_005)]
    assert list(streams.read_ranges("x", file, ranges)) == [content(*each) for each in ranges[:-1]] + [
        content(999_999, 1_000_000)
    ]
    assert sorted(file.requests) == [(0, 70_010), (5, 4), (5, 4), (900_000, 10), (999_999, 6)]


def test_requests_run_beside_each_other_and_few_bytes_are_on_their_way(monkeypatch):
    monkeypatch.setattr(streams, "_REQUEST", 100)
    monkeypatch.setattr(streams, "_ON_THEIR_WAY", 1000)
    file = Counted(10**6)
    ranges = [(begin, begin + 100) for begin in range(0, 20_000, 100)]
    for number, data in enumerate(streams.read_ranges("x", file, ranges)):
        assert data == content(*ranges[number])
        assert len(file.requests) <= number + 12
    assert 4 < file.most_at_once <= 12


def test_a_server_that_was_away_is_asked_again_and_what_no_waiting_mends_is_told():
    busy = StorageError("Please reduce your request rate.", "SlowDown", 503)
    denied = StorageError("Access Denied", "AccessDenied", 403)
    ranges = [(0, 10), (500_000, 500_010)]
    asked = streams.read_ranges("s3://b/x", Counted(10**6, [busy, busy]), ranges)
    assert list(asked) == [content(*each) for each in ranges]
    with pytest.raises(OSError, match="Access Denied"):
        list(streams.read_ranges("s3://b/x", Counted(10**6, [denied]), ranges))


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_members_are_the_same_from_anywhere_in_any_order_and_in_threads(tmp_path, s3, suffix, where):
    uri = f"s3://scalp/archives/a{suffix}" if where == "s3" else str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))
    names = list(FILES)
    for order in (names, names[::7], names[::-50]):
        assert list(archives.read_members(uri, order, LIMIT)) == [FILES[name] for name in order]
    pieces = [names[start : start + 50] for start in range(0, 200, 50)]
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda piece: list(archives.read_members(uri, piece, LIMIT)), pieces)
    assert [data for piece in read for data in piece] == list(FILES.values())
    if suffix != ".zip":
        assert [data for _, data in archives.stream(uri, LIMIT)] == list(FILES.values())


@pytest.mark.parametrize("suffix", PACK)
def test_one_who_stops_half_way_leaves_no_thread(tmp_path, suffix):
    uri = str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))
    before = threading.active_count()
    half_way = [archives.read_members(uri, list(FILES), LIMIT)]
    half_way += [] if suffix == ".zip" else [archives.stream(uri, LIMIT)]
    for each in half_way:
        next(each)
        each.close()
    del each, half_way
    archives._open_archives._archives.clear()  # a compressed tar is kept where it was read last
    waited = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < waited
        time.sleep(0.01)


def test_the_pieces_of_a_tar_that_nobody_wants_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_PIECE", 1000)
    uri = str(tmp_path / "a.tar")
    storage.write(uri, odd.tar_of([("1.jpg", b"x"), ("video.mp4", bytes(3 * 2**20)), ("2.jpg", b"y")]))
    asked = []
    fetch = streams.Ahead._fetch
    monkeypatch.setattr(
        streams.Ahead, "_fetch", lambda self, number: asked.append(number) or fetch(self, number)
    )
    given = list(archives.stream(uri, 2**30, wanted=lambda name: name.endswith(".jpg")))
    assert [data for _, data in given] == [b"x", None, b"y"]
    assert len(asked) < 300  # of 3,145; a buffer is filled at a time


def test_few_archives_are_kept_open_and_fewer_large_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_open_archives", archives._OpenArchives())
    kept = archives._open_archives._archives

    def open_one(number):
        uri = str(tmp_path / f"{number}.zip")
        storage.write(uri, odd.zip_of([("0.jpg", b"x"), ("1.jpg", b"x")]))
        archives.list_members(uri)

    for number in range(12):
        open_one(number)
    assert len(kept) == 8
    monkeypatch.setattr(archives, "_OPEN_MEMBERS", 5)
    open_one(12)
    assert [archive.held for archive in kept.values()] == [2, 2]
    monkeypatch.setattr(archives, "_OPEN_MEMBERS", 1)
    open_one(13)
    assert len(kept) == 1


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_server_that_stays_away_is_no_damage(tmp_path, monkeypatch, suffix):
    """Its photographs must not be counted out: the task ends, and the same command goes on another time."""
    uri = str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))

    def away(uri):
        raise StorageError("Please reduce your request rate.", "SlowDown", 503)

    monkeypatch.setattr(storage, "open_file", away)
    with pytest.raises(UserError, match="throttles requests"):
        rows = [row | {"kind": None} for row in inventory.list_root(inventory.Root(uri))]
        list(inventory.examine(rows, ""))
    (data,) = sources.read_photographs([Location(uri, "000.jpg")], LIMIT)
    assert data.code == "fetch_failed"
