"""Schemes of uris, and overlap of several sources."""

import pytest

from scalp_core.errors import UserError
from scalp_core.storage import uris


def test_sources_beside_each_other_are_taken(tmp_path):
    disjoint = ["a", "b", "a b", "a.zip", "ab/c", "aa"]
    uris.check_disjoint([str(tmp_path / name) for name in disjoint])
    uris.check_disjoint(["s3://x/a", "s3://x/ab", "s3://y/a", "s3://x/a.zip", "/x/a"])
    uris.check_disjoint(["s3://x"])
    uris.check_disjoint([])


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("s3://x/a", "s3://x/a/b/c.zip"),
        ("s3://x/a/", "s3://x/a/b"),
        ("s3://x", "s3://x/a"),
        ("/data", "/data/clinic/2024"),
        ("/", "/data"),
        ("/data", "/data/../data/clinic"),
    ],
)
def test_a_source_that_lies_in_another_is_refused_with_both_names(outer, inner):
    for given in ([outer, inner], [inner, "s3://other/a", outer]):
        with pytest.raises(UserError) as raised:
            uris.check_disjoint(given)
        assert str(raised.value).startswith(f"{inner} is inside {outer}; ")


def test_the_same_source_twice_is_refused_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for again in ("a", "./a", "b/../a", "a/", "link"):
        with pytest.raises(UserError, match="are the same source; give it once"):
            uris.check_disjoint([str(tmp_path / "a"), again])
    with pytest.raises(UserError, match="the same source"):
        uris.check_disjoint(["s3://x/a", "s3://x/a/"])


@pytest.mark.parametrize(
    ("uri", "fix"),
    [
        ("S3://clinic/out", "write s3://clinic/out"),
        ("s3:/clinic/out", "write s3://clinic/out"),
        ("s3a://clinic/out", "write s3://clinic/out"),
        ("s3:/", "write s3://BUCKET/PREFIX"),
        ("gs://clinic/out", "write s3://BUCKET/PREFIX, or the path of a local folder"),
        ("https://clinic/out", "write s3://BUCKET/PREFIX, or the path of a local folder"),
        ("file:///clinic/out", "write the path alone: /clinic/out"),
        ("s3://", "write s3://BUCKET/PREFIX"),
    ],
)
def test_uri_of_other_storage_does_not_become_a_local_path(uri, fix):
    with pytest.raises(UserError) as raised:
        uris.absolute(uri)
    problem, _, way_out = str(raised.value).partition("; ")
    assert problem.startswith(uri) and way_out.startswith(fix)


def test_local_names_with_a_colon_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:/photos", "a:b", "s3", "s3x/a", "2024-01-01T10:00/a", "./s3:/a"):
        assert uris.absolute(name) == str(tmp_path / name)
    assert uris.absolute("s3://clinic/out/") == "s3://clinic/out"


def test_folder_that_must_be_local_is_not_made_from_an_address_in_s3(tmp_path):
    assert uris.local_folder(tmp_path / "audit", "--audit") == tmp_path / "audit"
    with pytest.raises(UserError, match="^--audit s3://clinic/audit is not a local folder; choose one"):
        uris.local_folder("s3://clinic/audit", "--audit")
