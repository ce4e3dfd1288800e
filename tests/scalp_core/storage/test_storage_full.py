"""A full disk during a write: an error of one line, and no leftover files."""

import numpy as np
import pyarrow as pa
import pytest

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import parquet
from tests.support.disks import small_disk

LARGE = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def disk(tmp_path):
    """A real file system of 256 KiB, with one file in it."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        (folder / "there").write_bytes(b"old")
        yield folder


def rows(fail_after=None):
    """A million numbers that do not compress, in 20 batches; raises after some of them, on request."""

    def batches():
        for number in range(20):
            if number == fail_after:
                raise pa.ArrowInvalid("the source broke off")
            numbers = np.random.default_rng(number).integers(2**40, size=50_000)
            yield pa.record_batch([pa.array(numbers)], names=["number"])

    return pa.RecordBatchReader.from_batches(pa.schema({"number": pa.int64()}), batches())


WRITES = {
    "write": lambda uri: storage.write(uri, LARGE),
    "create": lambda uri: storage.create(uri, LARGE),
    "write_parquet": lambda uri: parquet.write(uri, rows().read_all()),
    "write_batches": lambda uri: parquet.write_batches(uri, rows()),
}


@pytest.mark.parametrize(("name", "file"), [*((name, "new") for name in WRITES), ("write", "there"),
                                            ("write_batches", "there")])  # fmt: skip
def test_a_full_disk_is_told_in_one_line_and_keeps_what_was_there(disk, name, file):
    uri = str(disk / file)
    with pytest.raises(UserError) as raised:
        WRITES[name](uri)
    assert str(raised.value) == (
        f"cannot write {uri}: the disk is full; free space there and run the same command again"
    )
    assert [path.name for path in disk.iterdir()] == ["there"]
    assert (disk / "there").read_bytes() == b"old"


def test_once_there_is_space_the_same_write_succeeds(disk):
    uri = str(disk / "new")
    with pytest.raises(UserError):
        storage.write(uri, LARGE)
    storage.write(uri, LARGE[: 2**16])
    assert storage.read(uri) == LARGE[: 2**16]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_rows_that_break_off_leave_no_file_of_fewer_rows(where, tmp_path, s3):
    place = str(tmp_path) if where == "local" else f"s3://scalp/full/{tmp_path.name}"
    uri = storage.join(place, "rows.parquet")
    parquet.write_batches(uri, rows())
    assert parquet.read(uri).num_rows == 1_000_000
    with pytest.raises(UserError, match="cannot write"):
        parquet.write_batches(uri, rows(fail_after=3))
    assert storage.list_files(place) == [uri]
    assert parquet.read(uri).num_rows == 1_000_000
