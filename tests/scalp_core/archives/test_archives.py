"""Reading archives: few parallel requests, bounded memory, retries while S3 is unavailable."""

import gc
import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest

from scalp_core import archives, storage
from scalp_core.archives import byte_ranges, zips
from scalp_core.datasets import examination, scan
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.storage.errors import StorageError
from tests.support import odd_archives as odd

FILES = {f"{index:03d}.jpg": b"%d" % index * 9_000 for index in range(199)} | {"empty.jpg": b""}
PACK = {
    ".zip": odd.zip_of,
    ".tar": odd.tar_of,
    ".tar.gz": lambda files: gzip.compress(odd.tar_of(files)),
}
LIMIT = 2**20


def read_members(uri, names):
    return [placed.data for placed in archives.read_placed(uri, names, LIMIT)]


class Counted:
    """A file that records its requests; the first `away` of them raise."""

    def __init__(self, size, away=()):
        self.requests = []
        self.at_once = self.most_at_once = 0
        self._size = size
        self._away = list(away)
        self._lock = threading.Lock()

    def read(self, offset, size):
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


def test_neighbors_come_by_one_request():
    file = Counted(10**6)
    ranges = [(begin, begin + 1000) for begin in range(0, 64_000, 1000)]
    ranges += [(70_000, 70_010)]  # a small gap
    ranges += [(900_000, 900_010), (5, 9), (5, 9), (999_999, 1_000_005)]
    assert list(byte_ranges.read_ranges("s3://b/x", ranges, file.read)) == [
        content(*each) for each in ranges[:-1]
    ] + [content(999_999, 1_000_000)]
    assert sorted(file.requests) == [(0, 70_010), (5, 4), (5, 4), (900_000, 10), (999_999, 6)]


def test_requests_run_beside_each_other_and_few_bytes_are_on_their_way(monkeypatch):
    monkeypatch.setattr(byte_ranges, "_REQUEST", 100)
    monkeypatch.setattr(byte_ranges, "_ON_THEIR_WAY", 1000)
    file = Counted(10**6)
    ranges = [(begin, begin + 100) for begin in range(0, 20_000, 100)]
    for number, data in enumerate(byte_ranges.read_ranges("s3://b/x", ranges, file.read)):
        assert data == content(*ranges[number])
        assert len(file.requests) <= number + 12
    assert 4 < file.most_at_once <= 12


def test_a_server_that_was_away_is_asked_again_and_what_no_waiting_mends_is_told(monkeypatch):
    busy = StorageError("Please reduce your request rate.", "SlowDown", 503)
    denied = StorageError("Access Denied", "AccessDenied", 403)
    ranges = [(0, 10), (500_000, 500_010)]
    away = Counted(10**6, [busy, busy])
    monkeypatch.setattr(storage, "_read", lambda _, piece: away.read(piece[0], piece[1] - piece[0]))
    assert list(byte_ranges.read_ranges("s3://b/x", ranges)) == [content(*each) for each in ranges]
    away = Counted(10**6, [denied])
    with pytest.raises(OSError, match="Access Denied"):
        list(byte_ranges.read_ranges("s3://b/x", ranges))


@pytest.mark.medium
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_members_are_the_same_from_anywhere_in_any_order_and_in_threads(tmp_path, s3, suffix, where):
    uri = f"s3://scalp/archives/a{suffix}" if where == "s3" else str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))
    names = list(FILES)
    for order in (names, names[::7], names[::-50]):
        assert read_members(uri, order) == [FILES[name] for name in order]
    pieces = [names[start : start + 50] for start in range(0, 200, 50)]
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda piece: read_members(uri, piece), pieces)
    assert [data for piece in read for data in piece] == list(FILES.values())
    if suffix != ".zip":
        assert [data for _, data in archives.stream_members(uri, LIMIT)] == list(FILES.values())


@pytest.mark.parametrize("suffix", PACK)
def test_one_who_stops_half_way_leaves_no_thread(tmp_path, suffix):
    uri = str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))
    before = threading.active_count()
    half_way = [archives.read_placed(uri, list(FILES), LIMIT)]
    half_way += [] if suffix == ".zip" else [archives.stream_members(uri, LIMIT)]
    for each in half_way:
        next(each)
        each.close()
    del each, half_way
    waited = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < waited
        time.sleep(0.01)


def test_the_pieces_of_a_tar_that_nobody_wants_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_ranges, "_PIECE", 1000)
    uri = str(tmp_path / "a.tar")
    storage.write(uri, odd.tar_of([("1.jpg", b"x"), ("video.mp4", bytes(3 * 2**20)), ("2.jpg", b"y")]))
    asked = []
    fetch = byte_ranges.ReadAheadFile._fetch
    monkeypatch.setattr(
        byte_ranges.ReadAheadFile, "_fetch", lambda self, number: asked.append(number) or fetch(self, number)
    )
    given = list(archives.stream_members(uri, 2**30, wanted=lambda name: name.endswith(".jpg")))
    assert [data for _, data in given] == [b"x", None, b"y"]
    assert len(asked) < 300  # of 3,145; a buffer is filled at a time


@pytest.fixture
def few_objects():
    """Hide the objects of other modules from the garbage collector, which would search them for seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_few_archives_stay_in_memory(few_objects, tmp_path, monkeypatch):
    archives._open.cache_clear()
    before = _archives_in_memory()
    monkeypatch.setattr(archives, "_LEAST", archives._OPEN_MEMBERS // 8)
    for number in range(12):
        uri = str(tmp_path / f"{number}.zip")
        storage.write(uri, odd.zip_of([("0.jpg", b"x"), ("1.jpg", b"x")]))
        list(archives.list_members(uri))
    assert _archives_in_memory() - before == 8
    monkeypatch.setattr(archives, "_LEAST", 2 * archives._OPEN_MEMBERS)
    list(archives.list_members(uri.replace("11.zip", "0.zip")))
    assert _archives_in_memory() - before == 1  # it has more members than are kept, and is kept


def _archives_in_memory() -> int:
    gc.collect()
    return sum(type(each) is zips.Zip for each in gc.get_objects())


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_server_that_stays_away_is_no_damage(tmp_path, monkeypatch, suffix):
    """Its images are not recorded as failed: the task ends, and the same command resumes later."""
    uri = str(tmp_path / f"a{suffix}")
    storage.write(uri, PACK[suffix](FILES.items()))

    def away(uri):
        raise StorageError("Please reduce your request rate.", "SlowDown", 503)

    monkeypatch.setattr(storage, "open_file", away)
    monkeypatch.setattr(storage, "open_raw", away)
    with pytest.raises(UserError, match="throttles requests"):
        rows = [row | {"kind": None} for row in scan.list_root(scan.Root(uri), open_tars=True)]
        list(examination.examine(rows, examination.Examination("")))
    (data,) = datasets_locations.read_images([Location(uri, "000.jpg")], LIMIT)
    assert data.code == "fetch_failed"


def test_threads_that_need_a_closed_archive_open_it_once(tmp_path, monkeypatch):
    uri = str(tmp_path / "a.zip")
    storage.write(uri, odd.zip_of(FILES.items()))
    opened = []
    table = zips._table
    monkeypatch.setattr(
        zips, "_table", lambda *arguments: opened.append(uri) or time.sleep(0.05) or table(*arguments)
    )
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda name: read_members(uri, [name]), list(FILES)[:16])
    assert [data for (data,) in read] == list(FILES.values())[:16]
    assert len(opened) == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_of_members_that_share_a_name_the_last_is_read_and_only_it_has_a_place(tmp_path, pack):
    files = [
        ("1.jpg", b"old"),
        ("2.jpg", b"two"),
        ("1.jpg", b"newer"),
        ("3.jpg", b"three"),
        ("1.jpg", b"new"),
    ]
    uri = str(tmp_path / "a.tar")
    storage.write(uri, pack(odd.tar_of(files)))
    assert read_members(uri, ["1.jpg", "3.jpg", "2.jpg"]) == [b"new", b"three", b"two"]
    (placed,) = archives.read_placed(uri, ["1.jpg"], LIMIT)
    assert (placed.place is None) == (pack is gzip.compress)


def test_members_by_place_are_one_request_each_and_changes_are_noticed(tmp_path, monkeypatch):
    requests = []
    read_range = storage.read_range
    monkeypatch.setattr(
        storage, "read_range", lambda *arguments: requests.append(arguments) or read_range(*arguments)
    )
    uri = str(tmp_path / "a.zip")
    storage.write(uri, odd.zip_of(FILES.items()))
    names = ["007.jpg", "150.jpg"]
    locations = [
        Location(uri, name, placed.place, sha256(FILES[name]).hexdigest())
        for name, placed in zip(names, archives.read_placed(uri, names, LIMIT), strict=True)
    ]
    requests.clear()
    monkeypatch.setattr(archives, "_opened", None)
    assert list(datasets_locations.read_images(locations[:1], LIMIT)) == [FILES["007.jpg"]]
    assert len(requests) == 1
    assert requests[0][1:] == (locations[0].place.offset, locations[0].place.length)
    for other in (odd.zip_of([(name, data[::-1] + b"x") for name, data in FILES.items()]), b"short"):
        storage.write(uri, other)
        found = list(datasets_locations.read_images(locations, LIMIT))
        assert [data.code for data in found] == ["changed", "changed"]
    (tmp_path / "a.zip").unlink()
    assert [data.code for data in datasets_locations.read_images(locations, LIMIT)] == ["not_found"] * 2
    loose = Location(str(tmp_path / "b.jpg"), sha256=sha256(b"before").hexdigest())
    storage.write(loose.uri, b"after")
    (data,) = datasets_locations.read_images([loose], LIMIT)
    assert data.code == "changed"


def test_a_member_by_place_that_unpacks_to_more_than_the_limit_is_refused(tmp_path):
    uri = str(tmp_path / "a.zip")
    storage.write(uri, odd.zip_of([("bomb.jpg", bytes(4 * LIMIT))]))
    (placed,) = archives.read_placed(uri, ["bomb.jpg"], 8 * LIMIT)
    (data,) = archives.read_places(uri, [placed.place], LIMIT)
    assert data.code == "too_many_bytes"


def test_whatever_storage_raises_for_one_file_is_an_error_of_that_file(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        storage.write(f"{tmp_path}/{name}.jpg", name.encode())
    open_file = storage.open_file

    def odd(uri):
        if uri.endswith("a.jpg"):
            raise ValueError("a key that the client refuses")
        return open_file(uri)

    monkeypatch.setattr(storage, "open_file", odd)
    locations = [Location(f"{tmp_path}/{name}.jpg") for name in ("a", "b", "none")]
    locations += [Location("gs://bucket/c.jpg"), Location(f"{tmp_path}/c.jpg")]
    first, second, *missing, last = datasets_locations.read_images(locations, LIMIT)
    assert (first.code, first.message) == ("internal_error", "ValueError: a key that the client refuses")
    assert (second, last) == (b"b", b"c")
    assert [error.code for error in missing] == ["not_found", "not_found"]
