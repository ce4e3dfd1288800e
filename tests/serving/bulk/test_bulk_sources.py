"""Sources of bulk runs: only those below the prefixes of the operator, in any notation."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobs.grade.listing import find_roots
from scalp_core.errors import UserError
from serving.auth.scopes import Rights
from serving.bulk.sources import allowed_source
from serving.http.problems import Refusal
from serving.schemas.bulk import BulkSettings

ADMIN = Rights(admin=True)
PREFIXES = ("s3://clinic/scalp", "s3://open")


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("s3://clinic/scalp", "s3://clinic/scalp"),
        ("s3://clinic/scalp/", "s3://clinic/scalp"),
        ("s3://clinic/scalp/2024/a b/두피.zip", "s3://clinic/scalp/2024/a b/두피.zip"),
        ("s3://clinic/scalp/...", "s3://clinic/scalp/..."),
        ("s3://open", "s3://open"),
        ("s3://open/any/where.tar.gz", "s3://open/any/where.tar.gz"),
        ("s3://open/it's; rm -rf $HOME", "s3://open/it's; rm -rf $HOME"),
    ],
)
def test_takes_what_lies_below_a_prefix(source, plain):
    assert allowed_source(source, PREFIXES, ADMIN) == plain


@pytest.mark.parametrize(
    "source",
    [
        "",
        "s3://",
        "s3:///clinic/scalp",
        "s3://clinic",
        "s3://clinic/",
        "s3://clinic/scalp-other",  # begins with the same letters
        "s3://clinic/scalp-other/x",
        "s3://clinic/scalpel",
        "s3://clinic/Scalp",
        "s3://clinic/scalp/../secret",
        "s3://clinic/scalp/./x",
        "s3://clinic/scalp/..",
        "s3://clinic/scalp//x",
        "s3://clinic/scalp/x//",
        "s3://clinic/scalp/%2e%2e/secret",
        "s3://clinic/scalp/x%2Fy",
        "s3://clinic/scalp\\..\\secret",
        "s3://clinic/scalp?versionId=1",
        "s3://clinic/scalp/x?endpoint_override=evil",
        "s3://clinic/scalp#x",
        "s3://user:key@clinic/scalp",
        "s3://clinic@evil/scalp",
        "s3://clinic:9000/scalp",
        "s3://open.evil/x",
        "s3://opens/x",
        "s3://.open/x",
        "S3://clinic/scalp",
        " s3://clinic/scalp",
        "s3:/clinic/scalp",
        "s3a://clinic/scalp",
        "http://169.254.169.254/latest/meta-data",
        "https://clinic/scalp",
        "file:///etc/passwd",
        "gs://clinic/scalp",
        "models://scalp",
        "/etc/passwd",
        "/s3://clinic/scalp",
        "clinic/scalp",
        "--replicas=100",
        "s3://clinic/scalp/a\nb",
        "s3://clinic/scalp/a\0b",
        "s3://clinic/scalp/\u202egpj.x",  # turns the direction of writing
        "s3://clinic/scalp/\u200b..",
        "s3://clinic/scalp/" + "x" * 1100,
        "s3://clinic/scalp/uris.csv",  # would name others
        "s3://clinic/scalp/uris.PARQUET",
    ],
)
def test_refuses_all_else(source):
    with pytest.raises(Refusal) as refused:
        allowed_source(source, PREFIXES, ADMIN)
    assert (refused.value.status_code, refused.value.code) == (403, "source_not_allowed")
    assert not any(prefix in refused.value.detail for prefix in PREFIXES)


def test_local_folders_and_links_out_of_them(tmp_path):
    (tmp_path / "in" / "2024").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "2024")
    prefixes = (f"{tmp_path}/in",)
    for name in ("", "/2024", "/again", "/not_there_yet"):
        assert allowed_source(f"{tmp_path}/in{name}", prefixes, ADMIN) == f"{tmp_path}/in{name}"
    for name in ("in/link", "in/link/x", "elsewhere", "in/../elsewhere", "in2", "in/%2e%2e"):
        with pytest.raises(Refusal):
            allowed_source(f"{tmp_path}/{name}", prefixes, ADMIN)


def test_a_key_reaches_its_own_prefixes_and_learns_of_no_other(tmp_path):
    ann = Rights(bulk=("s3://clinic/scalp/ann", f"{tmp_path}/ann"))
    (tmp_path / "ann").mkdir()
    (tmp_path / "ben").mkdir()
    (tmp_path / "ann" / "link").symlink_to(tmp_path / "ben")
    prefixes = (*PREFIXES, str(tmp_path))
    for source in ("s3://clinic/scalp/ann", "s3://clinic/scalp/ann/x.zip", f"{tmp_path}/ann"):
        assert allowed_source(source, prefixes, ann) == source
    elsewhere = ("s3://clinic/scalp", "s3://clinic/scalp/anna", "s3://nowhere", f"{tmp_path}/ann/link")
    for source in (*elsewhere, f"{tmp_path}/ben"):
        with pytest.raises(Refusal) as refused:
            allowed_source(source, prefixes, ann)
        # A key must not learn whether the operator allows a source that it may not use.
        assert (refused.value.code, refused.value.detail) == (
            "forbidden", f"the key lacks the scope bulk:{source}; ask the operator for it",
        )  # fmt: skip
    with pytest.raises(Refusal) as refused:
        allowed_source("s3://clinic/scalp/ann", ("s3://open",), ann)
    assert refused.value.code == "source_not_allowed"


@pytest.mark.parametrize(
    ("sources", "out", "said"),
    [
        ([], "s3://bkt/out", "at least 1 item"),
        (["s3://"], "s3://bkt/out", "name of the bucket"),
        (["/"], "s3://bkt/out", "absolute path"),
        (["photographs"], "s3://bkt/out", "absolute path"),
        (["https://b/c"], "s3://bkt/out", "absolute path"),
        (["s3://bkt/in"], "s3://bkt/in/out", "must not lie in each other"),
        (["s3://bkt"], "s3://bkt/out", "must not lie in each other"),
        (["s3://bkt/in"], "s3://bkt", "must not lie in each other"),
        (["s3://bkt/in/../x"], "s3://bkt/out", "between its slashes"),
    ],
)
def test_refuses_settings_that_would_allow_more_than_was_meant(sources, out, said):
    with pytest.raises(ValidationError, match=said):
        BulkSettings(sources=sources, out=out)


def test_a_job_lists_nothing_that_lies_elsewhere(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "uris.csv").write_text("uri\n/etc/passwd\n")
    for source in (str(tmp_path), str(tmp_path / "uris.csv")):
        with pytest.raises(UserError, match="--no-tables"):
            find_roots([source], tables=False)
