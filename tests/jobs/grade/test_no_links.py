"""`--no-links`: links that lead out of a local source are failed rows, and are not followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.data.tasks import split_roots
from jobs.grade.driver import GradeOptions, grade
from jobs.grade.files import read_listed_rows
from jobs.grade.listing import find_roots, write_groups
from jobs.grade.loading import LoadShard
from scalp_core import storage
from scalp_core.datasets import scan
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from tests.support.images import jpeg
from tests.support.small_grade import picture, rows, run, tarred, write_bundle


@pytest.fixture
def visit(tmp_path: Path) -> Path:
    """A source with an image, and links to other images, inside and outside."""
    folder, secret = tmp_path / "allowed" / "visit", tmp_path / "secret"
    for each in (folder / "deeper", secret):
        each.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(jpeg(1))
    (secret / "other.jpg").write_bytes(jpeg(2))
    (folder / "b.jpg").symlink_to(secret / "other.jpg")
    (folder / "more").symlink_to(secret)
    (folder / "deeper" / "up").symlink_to(tmp_path)
    (folder / "deeper" / "notes.txt").symlink_to(secret / "other.jpg")
    (folder / "inside.jpg").symlink_to(folder / "a.jpg")
    (folder / "gone.jpg").symlink_to(folder / "none.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "deeper" / "around").symlink_to(folder)
    return folder


REFUSED = {"b.jpg", "more", "deeper/up", "deeper/notes.txt"}


def list_rows(source: Path, links: bool = True) -> list[dict]:
    return [row for root in find_roots([str(source)], links=links) for row in scan.list_root(root)]


def codes(rows: list[dict], folder: Path) -> dict[str, str | None]:
    return {row["uri"].removeprefix(f"{folder}/"): row["code"] for row in rows}


def test_a_link_out_of_the_source_is_a_row_with_a_code(visit, tmp_path):
    rows = list_rows(visit, links=False)
    found = codes(rows, visit)
    assert {name for name, code in found.items() if code == "outside_link"} == REFUSED
    assert found["a.jpg"] is None and found["inside.jpg"] is None and found["gone.jpg"] == "not_found"
    assert not any("secret" in name or "other" in name for name in found)
    listed = list(write_groups(str(tmp_path / "listed"), 100, 0, rows))
    assert (listed[0].photographs, listed[-1].other_files) == (
        8,
        0,
    )  # a folder counts as the row that it hides


def test_without_the_option_links_are_followed_as_before(visit):
    found = codes(list_rows(visit), visit)
    assert "outside_link" not in found.values() and found["more/other.jpg"] is None


def test_tasks_and_a_source_that_is_one_link_refuse_as_well(visit, monkeypatch):
    monkeypatch.setattr(scan, "_MANY_ROOTS", 0)
    for many in (0, 64):  # as one piece, and divided by folders
        monkeypatch.setattr(scan, "_MANY_ROOTS", many)
        parts = split_roots(scan.divide_source(str(visit), links=False))
        rows = [row for _, roots in parts for root in roots for row in scan.list_root(root)]
        assert {name for name, code in codes(rows, visit).items() if code == "outside_link"} == REFUSED
    assert [file.is_outside for file in storage.walk(str(visit / "b.jpg"), str(visit))] == [True]


def test_a_source_that_became_a_link_is_refused(visit, tmp_path, monkeypatch):
    (visit.parent / "swapped").symlink_to(tmp_path / "secret")
    for source in (visit.parent / "swapped", visit / "deeper" / "up" / "secret"):
        with pytest.raises(UserError, match="is reached through a link, which --no-links refuses"):
            grade("bundle", str(source), f"{tmp_path}/out", GradeOptions(links=False))
    monkeypatch.chdir(visit.parent)
    for source in (f"{visit}/", "visit", "s3://clinic"):  # refused for their bundle alone
        with pytest.raises(UserError, match="bundle"):
            grade("bundle", source, f"{tmp_path}/out", GradeOptions(links=False))


def test_a_file_that_becomes_a_link_after_it_was_listed_is_not_read(visit, tmp_path):
    folder, spec = str(tmp_path / "listed"), Preprocess(size=32)
    (visit / "c.jpg").write_bytes(jpeg(3))
    rows = list_rows(visit, links=False)
    (group, *_) = write_groups(folder, 100, 0, rows)
    shard = list(read_listed_rows(folder, group))
    (visit / "c.jpg").unlink()
    (visit / "c.jpg").symlink_to(tmp_path / "secret" / "other.jpg")
    for within, code in (((str(visit.resolve()),), "outside_link"), ((), "")):
        columns = LoadShard("", None, spec, 100, 2, within)._load_shard("", shard, None).rows
        read = dict(
            zip((uri.rsplit("/", 1)[-1] for uri in columns["uri"]), columns["error_code"], strict=True)
        )
        assert (read["c.jpg"], read["a.jpg"]) == (code, "")


def test_a_run_reads_nothing_behind_a_link_also_when_it_tries_again(visit, tmp_path):
    (tmp_path / "secret" / "set.tar").write_bytes(tarred([("t.jpg", picture(4))]))
    (visit / "set.tar").symlink_to(tmp_path / "secret" / "set.tar")
    (visit / "cut.jpg").write_bytes(b"")
    bundle, out = write_bundle(f"{tmp_path}/bundle"), f"{tmp_path}/out"
    for retry in (False, True):
        summary = run(bundle, [str(visit)], out, retry=retry, links=False, report=False)
        assert (summary["by_error"]["outside_link"], summary["failed"]) == (5, 8)
        graded = [row["uri"].rsplit("/", 1)[-1] for row in rows(out) if row["status"] == "graded"]
        assert sorted(graded) == ["a.jpg", "inside.jpg"]
