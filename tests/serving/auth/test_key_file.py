"""The key file: scopes and expiry of its lines, and `scalp keys new`, `list` and `revoke`."""

from __future__ import annotations

import hashlib
import os
import stat
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from scalp_core.errors import UserError
from serving.auth import key_file
from serving.auth.keys import Key, parse_keys
from serving.auth.scopes import Rights

HASHES = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two", "three")}
TODAY = datetime.now(UTC).date()


def parsed(attributes: str) -> Key:
    (key,) = parse_keys([f"clinic-7: sha256:{HASHES['one']} {attributes}"], "keys.txt")
    return key


@pytest.mark.parametrize(
    ("attributes", "rights"),
    [
        ("", Rights(grade=True)),  # the least that is of use: no bulk run is seen or started
        ("scope=grade", Rights(grade=True)),
        ("scope=admin", Rights(admin=True)),
        ("scope=bulk:s3://clinic-7/", Rights(bulk=("s3://clinic-7",))),
        (
            "scope=grade  scope=bulk:/srv/두피%20x scope=bulk:s3://a-1/b",
            Rights(True, ("/srv/두피 x", "s3://a-1/b")),
        ),
    ],
)
def test_scopes_of_a_line(attributes, rights):
    assert parsed(attributes).rights == rights
    assert Rights.parse(rights.scopes) == rights
    assert not any(" " in scope for scope in rights.scopes)


@pytest.mark.parametrize(
    "attributes",
    [
        "scope=", "scope=Grade", "scope=bulk", "scope=bulk:", "scope=bulk:clinic", "scope=bulk:s3://",
        "scope=bulk:s3://a-1/../b", "scope=bulk:s3://a-1/%2e%2e/b", "scope=bulk:s3://a-1/%252e%252e/b",
        "scopes=grade", "grade", "expires=2027-3-1", "expires=2027-02-30", "expires=tomorrow",
        "expires=2027-03-01 expires=2028-03-01", "sEcret",
    ],
)  # fmt: skip
def test_an_invalid_attribute_is_refused_by_its_line_and_not_shown(attributes):
    with pytest.raises(UserError, match=r"line 1 of keys\.txt") as refused:
        parsed(attributes)
    assert "%252e" not in str(refused.value) and "sEcret" not in str(refused.value)
    assert HASHES["one"] not in str(refused.value)


def test_one_key_on_two_lines_with_other_scopes_is_refused():
    line = f"ann: sha256:{HASHES['one']}"
    assert len(parse_keys([line, line], "x")) == 1
    with pytest.raises(UserError, match="line 2 of x"):
        parse_keys([line, f"{line} scope=admin"], "x")


def test_a_key_is_accepted_through_its_last_day():
    assert not parsed("").is_expired
    assert not parsed(f"expires={TODAY + timedelta(days=1)}").is_expired  # today may end during the test
    assert parsed(f"expires={TODAY - timedelta(days=1)}").is_expired


def scalp(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_new_writes_scopes_and_the_end_into_the_line():
    out = scalp("new", "clinic-7", "--scope", "bulk:s3://clinic-7/a b", "--scope", "grade", "--days", "30")
    line = out.splitlines()[1].split(":", 1)[1]
    (key,) = parse_keys([line], "x")
    assert key.rights == Rights(True, ("s3://clinic-7/a b",))
    assert key.expires in (TODAY + timedelta(days=30), TODAY + timedelta(days=31))
    assert " scope=grade" in scalp("new", "clinic-7")
    assert scalp("new", "a", "--expires", "2099-03-01").strip().endswith("expires=2099-03-01")


@pytest.mark.parametrize(
    "options",
    [
        ("--scope", "bulk"), ("--scope", "all"), ("--expires", "2020-01-01"), ("--expires", "soon"),
        ("--expires", "2099-01-01", "--days", "3"), ("--days", "99999999999"),
    ],
)  # fmt: skip
def test_new_refuses_what_the_file_would(options):
    with pytest.raises(UserError, match=options[0]):
        CliRunner().invoke(app, ["keys", "new", "a", *options], catch_exceptions=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    one, two, three = HASHES.values()
    path.write_text(
        f"# of the clinics\n\nann: sha256:{one} scope=bulk:s3://ann\n# old\nann: sha256:{two} "
        f"expires=2020-03-01\nben: sha256:{three} scope=admin\n"
    )
    path.chmod(0o600)
    return path


def test_list_shows_what_a_key_may_and_the_start_of_its_hash(file):
    out = scalp("list", str(file))
    for shown in ("ann", "bulk:s3://ann", "grade", "admin", "never", "2020-03-01, which is over"):
        assert shown in out
    for digest in HASHES.values():
        assert digest[:8] in out and digest[:9] not in out


def test_revoke_removes_the_lines_of_an_id_and_keeps_the_rest(file):
    assert scalp("revoke", str(file), "ann").count("removed ann") == 2
    assert file.read_text() == f"# of the clinics\n\n# old\nben: sha256:{HASHES['three']} scope=admin\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.txt"]


def test_revoke_chooses_one_of_two_keys_by_its_hash(file):
    scalp("revoke", str(file), "ann", "--hash", HASHES["two"][:6].upper())
    assert [key.digest.hex() for key in parse_keys(file.read_text().splitlines(), "x")] == [
        HASHES["one"],
        HASHES["three"],
    ]


def test_revoke_refuses_what_it_does_not_find(file):
    before = file.read_text()
    same = hashlib.sha256(b"four").hexdigest()
    for id_, digits in (("eve", None), ("ann", HASHES["three"]), ("ann", "xyz")):
        with pytest.raises(UserError, match="has no key of"):
            key_file.revoke(str(file), id_, digits)
    assert file.read_text() == before
    file.write_text(f"{before}ann: sha256:{HASHES['one'][:3]}{same[3:]}\n")
    with pytest.raises(UserError, match="several keys"):
        key_file.revoke(str(file), "ann", HASHES["one"][:3])


def test_a_revocation_that_fails_leaves_the_file_as_it_was(file, monkeypatch):
    before = file.read_text()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the keys are as they were"):
        key_file.revoke(str(file), "ann")
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["keys.txt"]


def test_revoke_follows_a_link_to_the_file(file):
    link = file.with_name("link.txt")
    link.symlink_to(file)
    key_file.revoke(str(link), "ben")
    assert link.is_symlink() and "ben" not in file.read_text()


def test_a_day_is_a_day():
    assert parsed("expires=2027-03-01").expires == date(2027, 3, 1)
