"""DICOM files in bulk grading and in prepared data: images like others, silent about the patient."""

from pathlib import Path

import pytest

from scalp_core import storage
from scalp_core.datasets.examination import read_content
from tests.support.dicom_files import PATIENT, dicom
from tests.support.small_grade import SIDE, picture, rows, run, tarred, write_bundle, zipped

JPEG = picture(1)
FILE = dicom(JPEG, (SIDE, SIDE))


def answer(row):
    return {name: row[name] for name in ("status", "grade", "probabilities", "grade_set", "refer", "error")}


@pytest.mark.medium
def test_a_dicom_file_has_the_grade_of_its_jpeg_wherever_it_is(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    many = dicom(JPEG, (SIDE, SIDE), NumberOfFrames=3)
    files = {
        "a.jpg": JPEG,
        "b.dcm": FILE,
        "c.DICOM": FILE,
        "d.zip": zipped([("in.dcm", FILE)]),
        "e.tar": tarred([("in.dcm", FILE)]),
        "f.dcm": many,
    }
    for name, data in files.items():
        storage.write(str(source / name), data)
    summary = run(write_bundle(str(tmp_path / "bundle")), [str(source)], str(out))
    assert (summary["rows"], summary["graded"], summary["rows_unaccounted"]) == (6, 5, 0)
    found = {Path(row["uri"]).name: row for row in rows(str(out))}
    expected = answer(found["a.jpg"])
    assert all(answer(found[name]) == expected for name in ("b.dcm", "c.DICOM", "d.zip", "e.tar"))
    assert found["f.dcm"]["error_code"] == "unsupported_format"
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [value for value in PATIENT if value.encode() in content], path


def test_prepared_data_recognize_the_image_in_a_dicom_file():
    file, image = read_content("photograph", FILE), read_content("photograph", JPEG)
    assert file.pop("sha256") != image.pop("sha256")
    assert file == image
