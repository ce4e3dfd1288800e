"""One `image_id` in manifests, bulk rows and online answers; one `location_id` per place."""

from hashlib import sha256

import duckdb
import pytest

from scalp_core.datasets import manifest
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import image_id, location_id
from scalp_core.errors import ImageError
from scalp_core.inference.decision import Grading
from scalp_core.results.schema import RESULTS_FOLDER, Signature
from serving.schemas.grading import FailedLine, GradeResponse
from tests.support.result_rows import read_results
from tests.support.small_grade import picture, rows, run, write_bundle, zipped
from tests.support.sources import audited

GRADING = Grading(1, "mild", [0.1, 0.7, 0.1, 0.1], 1.2, [1], None, False, [])


@pytest.fixture
def source(tmp_path):
    """A folder with one image in two places, one as a member of a zip."""
    folder = tmp_path / "source" / "clinic"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(0, 128))
    (folder / "b.jpg").write_bytes(picture(1, 128))
    (folder / "c.jpg").write_bytes(b"no image")
    (folder / "d.zip").write_bytes(zipped([("again.jpg", picture(0, 128))]))
    return tmp_path / "source"


def test_an_image_in_two_places_has_two_rows_of_one_id(source, tmp_path):
    bundle, out = write_bundle(str(tmp_path / "bundle")), str(tmp_path / "out")
    summary = run(bundle, [str(source)], out, report=False)
    assert (summary["rows"], summary["rows_unaccounted"]) == (4, 0)
    found = rows(out)
    assert len({row["location_id"] for row in found}) == 4
    same = [row for row in found if row["image_id"] == image_id(sha256(picture(0, 128)).hexdigest())]
    assert sorted(row["member"] or "" for row in same) == ["", "again.jpg"]
    (bad,) = (row for row in found if row["status"] == "failed")
    assert bad["image_id"] == image_id(bad["sha256"])  # it was read, and is not an image


def test_an_image_that_was_not_read_has_no_image_id(source, tmp_path, monkeypatch):
    bundle, out = write_bundle(str(tmp_path / "bundle")), str(tmp_path / "out")
    gone = ImageError("not_found", "it is gone")
    monkeypatch.setattr("jobs.grade.loading.fetch", lambda locations, *_: [gone] * len(locations))
    summary = run(bundle, [str(source)], out, report=False)
    assert (summary["failed"], summary["rows_unaccounted"]) == (4, 0)
    assert {row["image_id"] for row in rows(out)} == {None}
    assert len({row["location_id"] for row in rows(out)}) == 4
    monkeypatch.undo()
    summary = run(bundle, [str(source)], out, retry=True, report=False)
    assert (summary["failed"], summary["rows_unaccounted"]) == (1, 0)


def test_bulk_rows_join_the_manifest_and_an_online_answer(source, tmp_path):
    out = str(tmp_path / "out")
    run(write_bundle(str(tmp_path / "bundle")), [str(source)], out, report=False)
    database = duckdb.connect()
    database.register("results", read_results(f"{out}/{RESULTS_FOLDER}"))
    database.register("prepared", audited(source, tmp_path / "data", method="none", task="unlabelled").table)
    digest = sha256(picture(1, 128)).hexdigest()
    online = GradeResponse.of(digest, (), GRADING, Signature("made", "cpu"))
    joined = database.sql("select count(*) from results join prepared using (image_id)").fetchall()
    assert joined == [(3,)]  # the manifest keeps one of the two that are the same
    query = "select uri from results where image_id = $id"
    matched = database.sql(query, params={"id": online.image_id}).fetchall()
    assert matched == [(str(source / "clinic" / "b.jpg"),)]
    failed = FailedLine.of("0", digest, ImageError("truncated", "cut"), "made")
    assert failed.image_id == online.image_id == image_id(digest)
    assert FailedLine.of("0", None, ImageError("fetch_failed", "gone"), "made").image_id is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Location("/d/a.zip!b.jpg"), Location("/d/a.zip", "b.jpg")),
        (Location("/d/a.zip\0b.jpg"), Location("/d/a.zip", "b.jpg")),
        (Location('["/d/a.zip", "b.jpg"]'), Location("/d/a.zip", "b.jpg")),
        (Location("/d/a", "b\0c"), Location("/d/a\0b", "c")),
        (Location("/d/caf\udce9.jpg"), Location("/d/cafe.jpg")),  # a name that is not UTF-8
    ],
)
def test_no_two_places_have_one_location_id(one, other):
    assert location_id(one) != location_id(other)
    assert location_id(one) == location_id(Location(one.uri, one.member or ""))
    assert len(location_id(one)) == manifest.ID_DIGITS
