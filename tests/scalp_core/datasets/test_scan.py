"""Listing and examining sources: archives in place, tables, and irregular files."""

import csv
import io
import json
import os
import tarfile
import unicodedata
import zipfile
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalp_core import archives, storage
from scalp_core.datasets import locations, manifest, scan
from scalp_core.datasets.group_by import GroupBy
from scalp_core.errors import UserError
from scalp_core.grades import parse_grade
from scalp_core.images import codecs
from tests.support import sources
from tests.support.images import jpeg


def examined(source):
    """Rows of all objects of a source."""
    return sources.examined(source).to_pylist()


def by_name(rows):
    return {(row["member"] or row["uri"]).rsplit("/", 1)[-1]: row for row in rows}


FILES = {
    "2/a.jpg": jpeg(1),
    "2/b.jpg": jpeg(2, size=(320, 240)),
    "3/c.jpg": jpeg(3),
    "3/broken.jpg": jpeg(4)[:5000],
    "notes.txt": b"a text",
    "package.json": b"{}",
}


def tar_of(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def put_folder(root):
    for name, data in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def put_zip(root):
    with zipfile.ZipFile(root / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return root / "all.zip"


def put_tar(root, suffix=".tar", mode="w"):
    tar_of(root / f"all{suffix}", FILES.items(), mode)
    return root / f"all{suffix}"


SOURCES = {
    "folder": put_folder,
    "zip": put_zip,
    "tar": put_tar,
    "folder of archives": lambda root: put_tar(root).parent,
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_kind_of_source_gives_the_same_objects(kind, where, tmp_path, s3):
    source = str(SOURCES[kind](tmp_path))
    if where == "s3":
        prefix = f"s3://scalp/inventory/{kind}"
        for file in storage.walk(source):
            name = file.uri.removeprefix(str(tmp_path))
            storage.write(f"{prefix}{name}", storage.read(file.uri))
        source = prefix + source.removeprefix(str(tmp_path))
    rows = by_name(examined(source))
    assert set(rows) == {name.rsplit("/", 1)[-1] for name in FILES}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "a.jpg": "photograph", "b.jpg": "photograph", "c.jpg": "photograph", "broken.jpg": "photograph",
        "notes.txt": "other", "package.json": "other",
    }  # fmt: skip
    assert (rows["b.jpg"]["width"], rows["b.jpg"]["height"], rows["b.jpg"]["code"]) == (320, 240, None)
    assert [rows[f"{name}.jpg"]["class_grade"] for name in "abc"] == [2, 2, 3]
    assert rows["broken.jpg"]["code"] == "truncated"
    assert len({rows[f"{name}.jpg"]["sha256"] for name in "abc"}) == 3


def test_a_member_that_is_shadowed_by_another_of_its_name_is_told_and_not_read(tmp_path):
    twice = [("1/a.jpg", jpeg(1)), ("1/a.jpg", jpeg(2))]
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning):
        for name, data in twice:
            archive.writestr(name, data)
    tar_of(tmp_path / "twice.tar", twice)
    rows = examined(tmp_path)
    assert sorted((row["uri"].rsplit(".", 1)[-1], row["code"] or "") for row in rows) == [
        ("tar", ""), ("tar", "shadowed_member"), ("zip", ""), ("zip", "shadowed_member"),
    ]  # fmt: skip
    assert len({row["sha256"] for row in rows if row["sha256"]}) == 1  # the later one, in each


def test_damaged_and_nested_archives_are_told(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no zip")
    (tmp_path / "no.tar").write_bytes(b"no tar, and quite long enough to be looked at" * 40)
    data = put_tar(tmp_path).read_bytes()
    (tmp_path / "all.tar").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", b"PK")
        archive.writestr("1/a.jpg", jpeg(1))
    rows = examined(tmp_path)
    codes = {(row["member"] or row["uri"].rsplit("/", 1)[-1]): row["code"] for row in rows}
    assert codes["no.zip"] == codes["no.tar"] == codes["all.tar"] == "bad_archive"
    assert codes["inner.zip"] == "nested_archive"
    assert codes["1/a.jpg"] is None
    assert codes["2/a.jpg"] is None  # what lies before the damage can be read


def test_a_corrupt_member_fails_alone(tmp_path):
    path = put_zip(tmp_path)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("2/a.jpg")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 0xFF
    path.write_bytes(bytes(data))
    rows = by_name(examined(path))
    assert rows["a.jpg"]["code"] == "fetch_failed"
    assert rows["b.jpg"]["code"] is rows["c.jpg"]["code"] is None


def test_names_in_an_archive_are_labels_and_never_paths(tmp_path):
    names = ["../../etc/1/a.jpg", "/abs/2/b.jpg", "3/" + "x" * 300 + ".jpg"]
    tar_of(tmp_path / "evil.tar", [(name, jpeg(index)) for index, name in enumerate(names)])
    with tarfile.open(tmp_path / "evil.tar", "a") as archive:
        link = tarfile.TarInfo("1/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows = examined(tmp_path / "evil.tar")
    assert sorted(row["class_grade"] for row in rows) == [1, 2, 3]  # the link is not a member
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tar"]


def test_a_name_that_is_not_utf8_is_told_with_what_to_do(tmp_path):
    folder = tmp_path / "1"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/\xb9\xcc\xbc\xbc.jpg", "wb") as file:  # noqa: PTH123 -- bytes
        file.write(jpeg())
    (row,) = examined(tmp_path)
    assert (row["kind"], row["code"]) == ("photograph", "bad_name")
    assert "convmv" in row["error"]


def test_two_names_that_are_not_utf8_stay_two(tmp_path):
    for raw in (b"/\xb9\xcc.jpg", b"/\xbc\xbc.jpg"):
        with open(os.fsencode(tmp_path) + raw, "wb") as file:  # noqa: PTH123 -- bytes
            file.write(jpeg())
    rows = examined(tmp_path)
    assert {row["code"] for row in rows} == {"bad_name"}
    assert {row["uri"].rsplit("/", 1)[-1] for row in rows} == {r"\xb9\xcc.jpg", r"\xbc\xbc.jpg"}


def test_a_folder_whose_name_is_not_utf8_is_listed_by_the_task_of_the_one_above(tmp_path):
    folder = os.fsencode(tmp_path) + "/미세각질".encode("cp949")
    os.mkdir(folder)  # noqa: PTH102 -- bytes
    with open(folder + b"/a.jpg", "wb") as file:  # noqa: PTH123
        file.write(jpeg())
    pa.array([root.uri for root in scan.divide_source(str(tmp_path))])  # can be handed to a worker
    (row,) = examined(tmp_path)
    assert (row["kind"], row["code"]) == ("photograph", "bad_name")


def test_a_table_names_photographs_labels_and_groups(tmp_path):
    (tmp_path / "p").mkdir()
    put_folder(tmp_path / "p")
    put_zip(tmp_path)
    with (tmp_path / "t.csv").open("w") as file:
        csv.writer(file).writerows(
            [
                ["URI", "label", "group", "member"],
                ["p/2/a.jpg", "2", "anna", ""],
                [tmp_path / "p/2/b.jpg", "중등도", "anna", ""],
                ["all.zip", "severe", "ben", "3/c.jpg"],
                ["p/none.jpg", "1", "", ""],
                ["p/3/c.jpg", "terrible", "", ""],
            ]
        )
    rows = examined(tmp_path / "t.csv")
    assert [row["given_label"] for row in rows] == [2, 2, 3, 1, None]
    assert [row["given_group"] for row in rows] == ["anna", "anna", "ben", None, None]
    assert [row["code"] for row in rows] == [None, None, None, "not_found", "bad_label"]
    table = pa.table({"uri": [str(tmp_path / "p/2/a.jpg")] * 2, "label": pa.array([1.0, None])})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row["given_label"] for row in examined(tmp_path / "t.parquet")] == [1, None]


def test_a_tables_rows_are_photographs_whatever_their_names(tmp_path):
    (tmp_path / "photo").write_bytes(jpeg())
    put_tar(tmp_path)
    lines = ["\ufeffUri,label,group", "photo,1,007", "photo,mild,", ",2,", "all.tar,3,"]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = examined(tmp_path / "t.csv")
    assert [row["kind"] for row in rows] == ["photograph"] * 4
    assert [row["code"] for row in rows] == [None, None, "not_found", "not_an_image"]
    assert [row["given_label"] for row in rows] == [1, 1, 2, 3]
    assert rows[0]["given_group"] == "007"


def test_a_table_without_uri_and_a_file_of_no_kind_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na.jpg,1\n")
    with pytest.raises(UserError, match="no column uri, only path, label"):
        examined(tmp_path / "t.csv")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not a folder, archive"):
        examined(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="check the path"):
        examined(tmp_path / "missing")


def test_a_link_to_a_folder_above_does_not_go_round_for_ever(tmp_path):
    put_folder(tmp_path)
    (tmp_path / "2" / "up").symlink_to(tmp_path)
    assert len(examined(tmp_path)) == len(FILES)


def test_label_files_that_are_none_are_told(tmp_path):
    folder = tmp_path / "Training" / "[라벨]미세각질_1.경증"
    folder.mkdir(parents=True)
    good = {f"value_{number}": "1" for number in range(1, 7)}
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "seven.json").write_text(json.dumps(good | {"value_2": "7"}))
    (folder / "torn.json").write_text("{")
    rows = by_name(examined(tmp_path))
    assert {name: row["code"] for name, row in rows.items()} == {
        "good.json": None, "seven.json": "bad_label", "torn.json": "bad_label"
    }  # fmt: skip
    assert rows["good.json"]["values"] == [1] * 6


# Objects that end no run, and sources of many objects


def test_an_object_that_nobody_expected_fails_alone(tmp_path, monkeypatch):
    (tmp_path / "set" / "①").mkdir(parents=True)
    put_folder(tmp_path / "set")
    (tmp_path / "set" / "①" / "d.jpg").write_bytes(jpeg(5))
    (tmp_path / "set" / "2" / "deep.json").write_bytes(b"[" * 100_000)
    (tmp_path / "set" / "2" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "set" / "2" / "gone.zip").symlink_to(tmp_path / "nowhere.zip")
    picture_size = codecs.picture_size

    def odd(data):
        if data == FILES["3/c.jpg"]:
            raise OverflowError("nobody expects this")
        return picture_size(data)

    monkeypatch.setattr(codecs, "picture_size", odd)
    rows = by_name(examined(tmp_path / "set"))
    assert len(rows) == len(FILES) + 4
    assert (rows["d.jpg"]["code"], rows["d.jpg"]["class_grade"]) == (None, None)
    assert rows["deep.json"]["kind"] == "other"
    assert rows["gone.jpg"]["code"] == rows["gone.zip"]["code"] == "not_found"
    assert (rows["c.jpg"]["code"], rows["c.jpg"]["kind"]) == ("internal_error", "photograph")
    assert rows["c.jpg"]["error"] == "OverflowError: nobody expects this"
    assert rows["a.jpg"]["code"] is rows["b.jpg"]["code"] is None


def test_digits_that_are_not_0_to_3_name_no_grade():
    assert [parse_grade(text) for text in ("0", "3", "2.중등도", " 1 ")] == [0, 3, 2, 1]
    odd = ("①", "①.원본", "²", "４", "4", "-1", "9" * 5000, "9" * 5000 + ".x", "1.중등도")
    assert [parse_grade(text) for text in odd] == [None] * len(odd)


def test_a_zip_whose_names_have_backslashes_has_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        for name in ("set\\2\\", "set\\2\\a.jpg"):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, jpeg(1))
    (row,) = examined(tmp_path / "net.zip")
    assert (row["member"], row["class_grade"], row["stem"]) == ("set/2/a.jpg", 2, "a")


def test_thousands_of_folders_are_listed_by_many_tasks_and_thousands_of_files_by_one(tmp_path, monkeypatch):
    pages = [([], [f"/set/{page}-{number}" for number in range(1000)]) for page in range(7)]
    monkeypatch.setattr(storage, "is_file", lambda _: False)
    monkeypatch.setattr(storage, "list_children", lambda *_: iter(pages))
    assert len(scan.divide_source("/set")) == 7000
    monkeypatch.setattr(scan, "_MOST_ROOTS", 6999)
    assert scan.divide_source("/set") == [scan.Root("/set")]  # what a driver holds is bounded
    file = storage.StoredFile("/set/a.jpg", 1)
    monkeypatch.setattr(storage, "list_children", lambda *_: iter([([file] * 1000, [])] * 7))
    assert scan.divide_source("/set") == [scan.Root("/set")]


# Where the bytes of members are


@pytest.mark.parametrize("kind", SOURCES)
def test_the_places_of_members_give_the_same_bytes_without_the_archive(kind, tmp_path, monkeypatch):
    rows = [row for row in examined(SOURCES[kind](tmp_path)) if row["sha256"]]
    assert len(rows) == 3
    assert {row["byte_length"] is not None for row in rows} == {kind != "folder"}
    assert {row["compression"] for row in rows} <= {None, "stored", "deflate"}
    if kind != "folder":
        monkeypatch.setattr(archives, "_opened", None)
        for row in rows:
            (data,) = locations.read_images([locations.location_of(row)], codecs.MAX_BYTES)
            assert sha256(data).hexdigest() == row["sha256"]


# Tables


def test_a_table_of_excel_in_korea_and_names_of_a_mac_are_read(tmp_path):
    decomposed = unicodedata.normalize("NFD", "두피.jpg")
    (tmp_path / decomposed).write_bytes(jpeg(1))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(unicodedata.normalize("NFD", "미세.jpg"), jpeg(2))
    (tmp_path / "t.csv").write_bytes(
        "uri,label,member\n두피.jpg,중등도,\na.zip,경증,미세.jpg\n".encode("cp949")
    )
    rows = examined(tmp_path / "t.csv")
    assert [(row["code"], row["given_label"]) for row in rows] == [(None, 2), (None, 1)]
    assert rows[0]["uri"] == str(tmp_path / decomposed)
    (tmp_path / "t.csv").write_bytes(b"uri,label\n\xff\xff.jpg,1\n")
    with pytest.raises(UserError, match="is neither UTF-8 nor cp949"):
        examined(tmp_path / "t.csv")


def test_a_group_called_na_is_a_group_and_a_label_called_na_is_none(tmp_path):
    lines = ["uri,label,group", "a.jpg,NA,NA", "b.jpg,,null", "c.jpg,1,"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    rows = examined(tmp_path / "t.csv")
    assert [row["given_group"] for row in rows] == ["NA", "null", None]
    assert [row["given_label"] for row in rows] == [None, None, 1]
    assert {row["code"] for row in rows} == {"not_found"}


def test_rows_of_a_manifest_keep_their_places_and_are_relative_to_its_directory(tmp_path):
    (tmp_path / "data").mkdir()
    path = put_zip(tmp_path / "data")
    rows = [row for row in examined(path) if row["sha256"]]
    relative = [row | {"uri": "all.zip", "split": "train", "image_id": row["sha256"]} for row in rows]
    known = [{name: row.get(name) for name in manifest.SCHEMA.names} for row in relative]
    manifest.write_manifest(str(tmp_path / "data"), pa.Table.from_pylist(known, schema=manifest.SCHEMA))
    listed = list(scan.list_root(scan.Root(f"{tmp_path}/data/manifest/split=train/part-0.parquet")))
    assert {row["uri"] for row in listed} == {str(path)}
    names = ("member", "byte_offset", "byte_length", "compression", "sha256")
    assert sorted([row[name] for name in names] for row in listed) == sorted(
        [row[name] for name in names] for row in rows
    )


# Groups


@pytest.mark.medium
@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ("folder", ["site/p1", "site/p1", "p2", None]),
        ("regex:(p\\d+)/", ["p1", "p1", "p2", None]),
        ("regex:p(\\d)/.*_(\\d+)", ["1/7", "1/8", "2/7", None]),
    ],
)
def test_groups_come_from_folders_or_names(tmp_path, group_by, groups):
    names = ["site/p1/2/a_7.jpg", "site/p1/3/b_8.jpg", "p2/0/a_7.jpg", "1/d.jpg"]
    for index, name in enumerate(names):
        (tmp_path / "p9" / name).parent.mkdir(parents=True)
        (tmp_path / "p9" / name).write_bytes(jpeg(index))
    with zipfile.ZipFile(tmp_path / "p9.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "p9" / name, name)
    for source in ("p9", "p9.zip"):
        out = tmp_path / f"of-{source}"
        rows = sources.audited(
            tmp_path / source, out, method="random", keys=(), group_by=group_by
        ).table.to_pylist()
        found = {row["member"] or row["uri"].removeprefix(f"{tmp_path}/p9/"): row for row in rows}
        for name, group in zip(names, groups, strict=True):
            assert found[name]["group"] == (group or found[name]["image_id"])


@pytest.mark.parametrize("text", ["patient", "regex:(", "regex:", "regex:x*"])
def test_groupings_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=r"--group-by .*; give folder or regex:PATTERN"):
        GroupBy(text)
