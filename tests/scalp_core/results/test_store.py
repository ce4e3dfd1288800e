"""The store of kept images: no metadata, one file and one row per image, nothing half kept or removed."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.grade.results import results
from scalp_core import storage
from scalp_core.datasets.manifest import image_id
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import read_picture
from scalp_core.images.preprocess import upright
from scalp_core.results.query import ResultRows, Selection
from scalp_core.results.store import NotKept, StoreReader, StoreWriter, remove_images
from scalp_core.storage import parquet
from tests.support import crashes, result_rows
from tests.support.command import run_scalp
from tests.support.dicom_files import PATIENT, dicom
from tests.support.images import jpeg

PLACE = (37.0, 33.0, 58.0)


def photo(number: int = 0, kind: str = "JPEG") -> bytes:
    """A photograph with a name and a position in its metadata."""
    exif = Image.Exif()
    exif[0x013B] = "Kim Haneul"
    exif[0x0112] = 6
    exif.get_ifd(0x8825).update({1: "N", 2: PLACE})
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def answer(data: bytes, **changes: object) -> dict[str, object]:
    """The columns of an answer to these bytes."""
    digest = sha256(data).hexdigest()
    sent = {"sha256": digest, "image_id": image_id(digest), "refer": True}
    return result_rows.row("sent", **(sent | changes))


def add(folder: Path | str, data: bytes, **changes: object) -> str:
    return StoreWriter(str(folder), 100).add(data, answer(data, **changes))


def pixels(data: bytes) -> np.ndarray:
    picture = read_picture(data, lambda *size: size)
    return upright(picture.pixels, picture.orientation)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_stored_file_has_the_pixels_and_no_metadata(tmp_path, kind):
    data = photo(kind=kind)
    assert b"Kim Haneul" in data
    stored_id = add(tmp_path, data)
    (row,) = StoreReader(str(tmp_path)).read().to_pylist()
    stored = Path(row["uri"]).read_bytes()
    assert b"Kim Haneul" not in stored
    assert not Image.open(io.BytesIO(stored)).getexif().get_ifd(0x8825)
    assert (row["sha256"], row["image_id"]) == (sha256(stored).hexdigest(), stored_id)
    assert stored_id != image_id(sha256(data).hexdigest())
    assert np.array_equal(pixels(stored), pixels(data))


def test_a_jpeg_without_metadata_keeps_its_bytes_and_its_id(tmp_path):
    stored_id = add(tmp_path, jpeg(1))
    assert stored_id == image_id(sha256(jpeg(1)).hexdigest())
    assert (tmp_path / "images" / f"{stored_id}.jpg").read_bytes() == jpeg(1)


def test_an_image_that_is_sent_again_is_one_file_and_one_row(tmp_path):
    stored_id = add(tmp_path, photo(), grade=1)
    assert add(tmp_path, photo(), grade=2) == stored_id
    assert files(tmp_path) == [
        f"images/{stored_id}.jpg", f"results/{stored_id}.parquet", "scalp.json"
    ]  # fmt: skip
    (row,) = StoreReader(str(tmp_path)).read().to_pylist()
    assert row["grade"] == 1, "the row that a reader may have seen stays"


def test_a_dicom_file_loses_its_header_and_is_refused_if_its_pixels_identify(tmp_path):
    add(tmp_path, dicom(pixels(jpeg(0))))
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(secret.encode() in stored for secret in PATIENT)
    with pytest.raises(NotKept) as refusal:
        add(tmp_path, dicom(pixels(jpeg(0)), BurnedInAnnotation="YES"))
    assert refusal.value.reason == "identifying"
    assert len(files(tmp_path)) == 3


def test_a_damaged_image_or_another_folder_writes_nothing(tmp_path):
    with pytest.raises(ImageError):
        add(tmp_path / "store", b"no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by scalp serve"):
        add(tmp_path / "other", jpeg(0))
    assert files(tmp_path) == ["other/notes.txt"]


def test_a_full_store_confirms_only_what_it_has_and_counts_again(tmp_path):
    now = 0.0
    writer = StoreWriter(str(tmp_path), 2, lambda: now)
    ids = [writer.add(data, answer(data)) for data in (jpeg(0), jpeg(1))]
    with pytest.raises(NotKept) as refusal:
        writer.add(jpeg(2), answer(jpeg(2)))
    assert refusal.value.reason == "store_full"
    assert writer.add(jpeg(0), answer(jpeg(0))) == ids[0]
    list(remove_images(str(tmp_path), ids[:1]))
    now = 61.0
    assert writer.add(jpeg(2), answer(jpeg(2))) not in ids


@pytest.mark.medium
def test_a_killed_writer_leaves_no_row_without_its_image_and_is_repeated(tmp_path):
    for number, point in enumerate(crashes.points()):
        folder = tmp_path / str(number)
        was_killed = crashes.killed_at(point, add, str(folder), jpeg(0))
        for row in StoreReader(str(folder)).read().to_pylist():
            assert sha256(Path(row["uri"]).read_bytes()).hexdigest() == row["sha256"]
        stored_id = add(folder, jpeg(0))
        assert [row["image_id"] for row in StoreReader(str(folder)).read().to_pylist()] == [stored_id]
        list(remove_images(str(folder), [stored_id]))
        assert files(folder)[-1:] == ["scalp.json"] and not list(folder.rglob(f"*{stored_id}*"))
        if not was_killed:
            break
    assert number > 3


def test_a_reader_follows_what_is_added_and_removed(tmp_path):
    reader = StoreReader(str(tmp_path))
    assert reader.read().num_rows == 0
    newest, oldest = (
        add(tmp_path, jpeg(number), graded_at=datetime(2026, 11, day, tzinfo=UTC))
        for number, day in ((0, 2), (1, 1))
    )
    assert reader.read()["image_id"].to_pylist() == [oldest, newest]
    list(remove_images(str(tmp_path), [oldest]))
    assert reader.read()["image_id"].to_pylist() == [newest]
    storage.write(f"{tmp_path}/results/odd.parquet", b"no parquet")
    with pytest.raises(UserError, match="odd.parquet"):
        reader.read()


def test_the_command_removes_an_image_and_refuses_an_unknown_one(tmp_path):
    stored_id = add(tmp_path, jpeg(0))
    removed = run_scalp("store", "remove", tmp_path, stored_id)
    assert (removed.returncode, removed.stdout) == (0, f"removed {stored_id}\n")
    assert files(tmp_path) == ["scalp.json"]
    again = run_scalp("store", "remove", tmp_path, stored_id)
    assert (again.returncode, again.stdout) == (2, "")
    assert f"has no image '{stored_id}'" in again.stderr


def test_removing_reports_what_is_not_there_and_removes_nothing(tmp_path):
    stored_id = add(tmp_path, jpeg(0))
    for unknown in ("0" * 20, "../images", ""):
        with pytest.raises(UserError, match="has no image"):
            list(remove_images(str(tmp_path), [stored_id, unknown]))
    assert len(files(tmp_path)) == 3
    with pytest.raises(UserError, match="not a store"):
        list(remove_images(str(tmp_path / "images"), [stored_id]))


def test_scalp_results_reads_a_store(tmp_path, capsys):
    StoreWriter(str(tmp_path), 1).claim()
    with pytest.raises(UserError, match="no image yet"):
        results(str(tmp_path))
    add(tmp_path, jpeg(0))
    add(tmp_path, jpeg(1), refer=False)
    with ResultRows(str(tmp_path)) as rows:
        assert rows.totals(Selection(status="referred"))["photographs"] == 1
    assert results(str(tmp_path)) > 0
    assert "not finished" not in capsys.readouterr().out
    with pytest.raises(UserError, match="a store of the endpoint"):
        results(str(tmp_path), to=f"{tmp_path}/out.ndjson", write="fhir")


def test_a_store_in_s3(s3):
    folder = "s3://scalp/kept"
    stored_id = add(folder, photo())
    assert add(folder, photo()) == stored_id
    reader = StoreReader(folder)
    (row,) = reader.read().to_pylist()
    assert sha256(storage.read(row["uri"])).hexdigest() == row["sha256"]
    assert parquet.read(f"{folder}/results/{stored_id}.parquet").num_rows == 1
    assert list(remove_images(folder, [stored_id])) == [stored_id]
    assert reader.read().num_rows == 0
    assert storage.names_in(f"{folder}/images") == set()
