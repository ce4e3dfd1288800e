"""What bulk grading makes of a tar that it reads in one pass."""

from collections import Counter

import pytest

from jobs.grade_shards import _tar_rows
from scalp_core import archives
from scalp_core.errors import UserError
from scalp_core.storage_errors import StorageError
from tests import odd_archives as odd

FILES = [("1.jpg", b"one"), ("1.json", b"{}"), ("2.jpg", b"two"), ("1.jpg", b"again"), ("in.zip", b"PK")]


def test_photographs_are_given_and_all_else_is_counted_or_told(tmp_path):
    uri = str(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(odd.tar_of(FILES) + b"something else")
    counts = Counter()
    one, two, nested, damage = _tar_rows(uri, counts)
    assert one == ({"uri": uri, "member": "1.jpg"}, b"one")
    assert two == ({"uri": uri, "member": "2.jpg"}, b"two")
    assert (nested[0]["member"], nested[1].code) == ("in.zip", "nested_archive")
    assert (damage[0]["member"], damage[1].code) == (None, "bad_archive")
    assert counts == {"other_files": 1, "shadowed": 1}


def test_a_tar_whose_server_goes_away_is_not_taken_to_end_there(monkeypatch):
    def stream(uri, max_bytes, wanted):
        yield archives.Member("1.jpg", 3), b"one"
        raise UserError("the S3 server did not answer") from StorageError(
            "refused", "EndpointConnectionError"
        )

    monkeypatch.setattr(archives, "stream", stream)
    rows = _tar_rows("s3://b/a.tar", Counter())
    assert next(rows)[1] == b"one"
    with pytest.raises(UserError, match="did not answer"):
        next(rows)
