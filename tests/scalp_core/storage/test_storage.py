import io
import tarfile
import threading
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from scalp_core import storage
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.errors import ImageError, UserError
from scalp_core.storage import s3 as client
from scalp_core.storage.errors import StorageError

LIMIT = 1000


def read_one(location: Location) -> bytes | ImageError:
    (data,) = datasets_locations.read_images([location], LIMIT)
    return data


def test_a_folder_lists_its_photographs_and_those_in_its_zips(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.PNG", "notes.txt", "._a.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("c/d.jpeg", b"y")
        archive.writestr("__MACOSX/._d.jpeg", b"z")
    listing = datasets_locations.list_images(str(tmp_path))
    names = {str(location).removeprefix(f"{tmp_path}/") for location in listing.images}
    assert names == {"a.jpg", "sub/b.PNG", "more.zip!c/d.jpeg"}
    assert listing.other_files == 3


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz")])
def test_members_of_a_tar_are_listed_and_read_in_any_order(tmp_path, suffix, mode):
    path = tmp_path / f"photographs{suffix}"
    names = [f"{index}.jpg" for index in range(5)]
    with tarfile.open(path, mode) as archive:
        for index, name in enumerate([*names, "notes.txt"]):
            info = tarfile.TarInfo(name)
            info.size = 10 + index
            archive.addfile(info, io.BytesIO(bytes([index]) * info.size))
    listing = datasets_locations.list_images(str(path))
    assert [location.member for location in listing.images] == names
    assert listing.other_files == 1
    for order in (names, names[::-1], [names[3], "none.jpg", names[0]]):
        read = list(datasets_locations.read_images([Location(str(path), name) for name in order], LIMIT))
        for name, data in zip(order, read, strict=True):
            if name in names:
                index = names.index(name)
                assert data == bytes([index]) * (10 + index)
            else:
                assert data.code == "not_found"


def test_an_archive_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "a.zip"
    for content in (b"first", b"second, and longer"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jpg", content)
        assert read_one(Location(str(path), "a.jpg")) == content


def test_members_of_a_korean_windows_zip_keep_their_names(tmp_path):
    name = "미세각질_2.중등도/사진.jpg"
    path = tmp_path / "korean.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X" * len(name.encode("cp949")), b"photograph")
    # What Korean Windows writes: cp949 bytes and no UTF-8 flag.
    path.write_bytes(path.read_bytes().replace(b"X" * len(name.encode("cp949")), name.encode("cp949")))
    (location,) = datasets_locations.list_images(str(path)).images
    assert location.member == name
    assert read_one(location) == b"photograph"


NAME = "[원천]미세각질_2.중등도/사진.jpg"


@pytest.mark.parametrize(("encoding", "form"), [("utf-8", "NFC"), ("utf-8", "NFD"), ("cp949", "NFC")])
def test_names_that_do_not_say_their_encoding_are_understood(tmp_path, encoding, form):
    """macOS writes UTF-8 without saying so, Korean Windows cp949."""
    name = unicodedata.normalize(form, NAME)
    raw = name.encode(encoding)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X" * len(raw), b"zipped")
    path.write_bytes(path.read_bytes().replace(b"X" * len(raw), raw))
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(
            tmp_path / f"a{suffix}", mode, format=tarfile.USTAR_FORMAT, encoding=encoding
        ) as archive:
            info = tarfile.TarInfo(name)
            info.size = 6
            archive.addfile(info, io.BytesIO(b"tarred"))
    locations = datasets_locations.list_images(str(tmp_path)).images
    assert [location.member for location in locations] == [name] * 3
    assert [read_one(location)[:3] for location in locations] == [b"tar", b"tar", b"zip"]


def test_a_file_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(bytes(LIMIT + 1))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(10_000_000))
    for location in (Location(str(path)), Location(str(tmp_path / "bomb.zip"), "bomb.jpg")):
        assert read_one(location).code == "too_many_bytes"


def test_a_member_that_lies_about_its_size_is_refused(tmp_path):
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(50_000))
    size = (50_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (10).to_bytes(4, "little")))
    # Read to the size it claims, and refused by the checksum: never more than the limit in memory.
    assert read_one(Location(str(path), "a.jpg")).code in {"fetch_failed", "too_many_bytes"}


def test_what_is_gone_or_was_never_there_says_so(tmp_path):
    assert read_one(Location(str(tmp_path / "gone.jpg"))).code == "not_found"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    assert read_one(Location(str(tmp_path / "a.zip"), "b.jpg")).code == "not_found"
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    assert read_one(Location(str(tmp_path / "broken.zip"), "a.jpg")).code == "fetch_failed"
    with pytest.raises(UserError, match="is not an archive of its kind or it is damaged"):
        datasets_locations.list_images(str(tmp_path / "broken.zip"))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://", "has no bucket"),
        ("gs://bucket/a", "is neither a local path nor s3://"),
        ("s3://no-such-bucket/a", "the bucket does not exist"),
        ("s3://scalp/no/such/prefix", "check the path"),
    ],
)
def test_a_uri_that_cannot_be_read_says_why(s3, uri, words):
    with pytest.raises(UserError, match=words):
        storage.list_files(uri)


def test_an_empty_bucket_is_not_said_to_be_missing(s3):
    client.answer("create_bucket", Bucket="nothing-yet")
    for look in (storage.list_files, storage.is_file):
        with pytest.raises(UserError, match="the bucket s3://nothing-yet/? is empty; give another"):
            look("s3://nothing-yet/")


def test_a_write_is_whole_or_not_at_all(tmp_path, s3):
    storage.write(str(tmp_path / "new" / "a.json"), b"first")
    storage.write(str(tmp_path / "new" / "a.json"), b"second")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert storage.read(str(tmp_path / "new" / "a.json")) == b"second"
    storage.write("s3://scalp/storage/a b/미세각질.json", b"third")
    assert storage.list_files("s3://scalp/storage") == ["s3://scalp/storage/a b/미세각질.json"]
    assert storage.read("s3://scalp/storage/a b/미세각질.json") == b"third"


def test_folders_of_many_objects_are_removed_and_no_others(s3, tmp_path, monkeypatch):
    answer = client.answer

    def short_pages(name, **query):
        return answer(name, **query | ({"MaxKeys": 2} if name == "list_objects_v2" else {}))

    monkeypatch.setattr(client, "answer", short_pages)
    folder, other = f"s3://scalp/{tmp_path.name}/folder", f"s3://scalp/{tmp_path.name}/folder2/a"
    names = [
        "kept",
        "top",
        *(f"{outer}/{inner}/{name}" for outer in "ab" for inner in "xyz" for name in "12345"),
    ]
    for uri in (*(f"{folder}/{name}" for name in names), other):
        storage.write(uri, b"")
    removed = []
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_file", removed.append)
        storage.remove_folder(folder, last="kept")
    assert storage.list_files(folder) == removed == [f"{folder}/kept"]
    storage.remove_folder(folder, last="kept")
    assert storage.list_files(f"s3://scalp/{tmp_path.name}") == [other]


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, s3):
    """A separate folder or prefix per test."""
    return str(tmp_path) if request.param == "local" else f"s3://scalp/create/{tmp_path.name}"


def test_what_is_there_is_not_created_again(place):
    uri = storage.join(place, "new", "a.json")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second")
    assert not storage.create(uri, b"first")
    assert storage.read(uri) == b"first"
    assert storage.list_files(place) == [uri]


def test_of_all_who_create_at_once_exactly_one_wins(place):
    for turn in range(5):
        uri, barrier = storage.join(place, f"{turn}.json"), threading.Barrier(2)

        def create(data, uri=uri, barrier=barrier):
            barrier.wait()
            return storage.create(uri, data)

        with ThreadPoolExecutor(2) as pool:
            won = dict(zip((b"one", b"two"), pool.map(create, (b"one", b"two")), strict=True))
        assert sum(won.values()) == 1
        assert won[storage.read(uri)]


def test_a_created_file_whose_answer_was_lost_is_ones_own(s3, tmp_path, monkeypatch):
    answer, lost = client.answer, []

    def losing(operation, **query):
        result = answer(operation, **query)
        if operation == "put_object" and not lost:
            lost.append(query)
            raise StorageError("Connection was closed", "ConnectionClosedError")
        return result

    monkeypatch.setattr(client, "answer", losing)
    uri = f"s3://scalp/create/{tmp_path.name}/a.json"
    assert storage.create(uri, b"ours")
    assert lost
    assert not storage.create(uri, b"theirs")
