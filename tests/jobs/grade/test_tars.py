"""Rows of bulk grading for a tar, which is read in one pass."""

import bz2
import gzip
import lzma
from hashlib import sha256

import pytest

from jobs.grade import loading
from jobs.grade.loading import TarRows
from scalp_core import archives, storage
from scalp_core.datasets import examination, locations, scan
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.storage.errors import StorageError
from tests.support import odd_archives as odd
from tests.support.small_grade import picture, rows, run, tarred, write_bundle

FILES = [("1.jpg", b"one"), ("1.json", b"{}"), ("2.jpg", b"two"), ("1.jpg", b"again"), ("in.zip", b"PK")]


def test_images_are_given_and_all_else_is_counted_or_reported(tmp_path):
    uri = str(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(odd.tar_of(FILES) + b"something else")
    rows = TarRows(uri, loading._version(uri))
    one, two, again, nested, damage = rows
    assert one == ({"uri": uri, "member": "1.jpg"}, b"one")
    assert two == ({"uri": uri, "member": "2.jpg"}, b"two")
    assert again == ({"uri": uri, "member": "1.jpg"}, b"again")
    assert (nested[0]["member"], nested[1].code) == ("in.zip", "nested_archive")
    assert (damage[0]["member"], damage[1].code) == (None, "bad_archive")
    # Of a name's members the last counts, as for `tar x` and `scalp prepare`.
    assert (rows.count, rows.dropped, rows.other_files) == (5, [0], 1)


def test_a_tar_that_changes_while_it_is_read_has_a_row_that_says_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(odd.tar_of(FILES[:1]))
    *_, (row, error) = TarRows(str(tmp_path / "a.tar"), "another")
    assert (row["member"], error.code) == (None, "changed")


def test_a_tar_whose_server_goes_away_is_not_taken_to_end_there(monkeypatch):
    def stream(uri, max_bytes, wanted):
        yield archives.Member("1.jpg", 3), b"one"
        raise UserError("the S3 server did not answer") from StorageError("away", code="SlowDown")

    monkeypatch.setattr(archives, "stream_members", stream)
    rows = iter(TarRows("s3://b/a.tar", ""))
    assert next(rows)[1] == b"one"
    with pytest.raises(UserError, match="did not answer"):
        next(rows)


def test_grade_prepare_and_reading_by_name_take_the_same_of_two_members_of_one_name(tmp_path):
    uri, out, (old, new) = str(tmp_path / "a.tar"), str(tmp_path / "out"), (picture(1, 128), picture(2, 128))
    (tmp_path / "a.tar").write_bytes(tarred([("x/1.jpg", old), ("x/1.jpg", new)]))
    run(write_bundle(str(tmp_path / "bundle")), [uri], out, report=False)
    (row,) = rows(out)
    listed = list(scan.list_root(scan.Root(uri), open_tars=True))
    (examined,) = examination.examine(listed, examination.Examination(str(tmp_path)))
    taken = [found["sha256"] for found in examined.to_pylist() if found["code"] is None]
    (by_name,) = locations.read_images([Location(uri, "x/1.jpg")], 10**7)
    assert {row["sha256"], *taken, sha256(by_name).hexdigest()} == {sha256(new).hexdigest()}


def test_each_tar_of_another_compression_is_a_failed_row_and_its_neighbors_are_graded(tmp_path):
    bundle, tar = write_bundle(str(tmp_path / "bundle")), tarred([("1.jpg", picture(1))])
    refused = {"a.tar.xz": lzma.compress(tar), "b.tbz2": bz2.compress(tar), "c.tar.zst": b"\x28\xb5\x2f\xfd1"}
    for name, data in (refused | {"2.jpg": picture(2), "d.tgz": gzip.compress(tar)}).items():
        storage.write(f"{tmp_path}/set/{name}", data)
    summary = run(bundle, [str(tmp_path / "set")], str(tmp_path / "out"), report=False)
    assert (summary["graded"], summary["by_error"], summary["other_files"]) == (2, {"bad_archive": 3}, 0)
    failed = [row for row in rows(str(tmp_path / "out")) if row["status"] == "failed"]
    assert {row["uri"].rsplit("/", 1)[1] for row in failed} == set(refused)
    assert all("unpack it, or repack it as .tar or .tar.gz" in row["error"] for row in failed)
    alone = run(bundle, [f"{tmp_path}/set/a.tar.xz"], str(tmp_path / "alone"), report=False)
    assert (alone["rows"], alone["by_error"]) == (1, {"bad_archive": 1})


def test_members_of_a_compressed_tar_are_graded_by_name_and_retried(tmp_path):
    bundle, uri, out = write_bundle(str(tmp_path / "bundle")), f"{tmp_path}/a.tar.gz", str(tmp_path / "out")
    files = [(f"{index}.jpg", picture(index)) for index in range(12)]
    storage.write(uri, gzip.compress(tarred(files[:9])))
    lines = [f"a.tar.gz,{name}" for name, _ in reversed(files)]
    storage.write(f"{tmp_path}/t.csv", "\n".join(["uri,member", *lines]).encode())
    summary = run(bundle, [f"{tmp_path}/t.csv"], out, report=False)
    assert (summary["graded"], summary["by_error"]) == (9, {"not_found": 3})
    storage.write(uri, gzip.compress(tarred(files)))
    assert run(bundle, [f"{tmp_path}/t.csv"], out, retry=True, report=False)["graded"] == 12
    digests = {row["member"]: row["sha256"] for row in rows(out)}
    assert digests == {name: sha256(data).hexdigest() for name, data in files}
