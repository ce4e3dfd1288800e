"""Bulk grading against real files and a real S3 server: every photograph accounted for, once."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from jobs.grade import grade
from scalp_core import storage
from scalp_core.bundle import load_bundle
from scalp_core.errors import UserError
from scalp_core.results import RESULTS_FOLDER, SCHEMA, read_results
from tests.conftest import jpeg

GOOD = {f"session {index % 3}/photo_{index}.jpg": jpeg(index) for index in range(9)}
BAD = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"hello", "not_an_image"),
    "cut.jpg": (jpeg(1)[:9000], "truncated"),
}
FILES = GOOD | {name: content for name, (content, _) in BAD.items()} | {"notes.txt": b"no photograph"}


def zipped(files: dict[str, bytes], encoding: str = "utf-8") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put_source(kind: str, tmp_path: Path) -> str:
    if kind == "folder":
        for name, content in FILES.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "source")
    if kind == "zip":
        (tmp_path / "source.zip").write_bytes(zipped(FILES))
        return str(tmp_path / "source.zip")
    if kind == "s3 zip":
        uri = f"s3://scalp/{tmp_path.name}/source.zip"
        storage.write(uri, zipped(FILES))
        return uri
    if kind == "s3 tar.gz":
        uri = f"s3://scalp/{tmp_path.name}/source.tar.gz"
        storage.write(uri, tarred(FILES))
        return uri
    prefix = f"s3://scalp/{tmp_path.name}/prefix"
    for name, content in FILES.items():
        storage.write(f"{prefix}/{name}", content)
    return prefix


def by_name(out: str) -> dict[str, dict]:
    rows = read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()
    named = {(row["member"] or row["uri"]).rsplit("/", 1)[-1]: row for row in rows}
    assert len(named) == len(rows)
    return named


@pytest.mark.parametrize("kind", ["folder", "zip", "s3 zip", "s3 tar.gz", "s3 prefix"])
def test_every_photograph_of_a_source_becomes_one_row(bundle, cluster, tmp_path, kind):
    source, out = put_source(kind, tmp_path), str(tmp_path / "out")
    summary = grade(str(bundle), source, out)
    assert (summary["rows"], summary["graded"], summary["failed"]) == (12, 9, 3)
    assert (summary["rows_unaccounted"], summary["other_files"]) == (0, 1)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    rows = by_name(out)
    version = load_bundle(str(bundle)).spec.model_version
    for name in GOOD:
        row = rows[name.rsplit("/", 1)[-1]]
        assert (row["status"], row["error_code"], row["model_version"]) == ("graded", None, version)
        assert row["grade"] in row["grade_set"]
        assert sum(row["probabilities"]) == pytest.approx(1)
    for name, (_, code) in BAD.items():
        row = rows[name]
        assert (row["status"], row["error_code"], row["grade"], row["refer"]) == ("failed", code, None, None)
        assert row["error"]
    assert read_results(f"{out}/{RESULTS_FOLDER}").schema.equals(SCHEMA)


def test_the_output_may_be_in_s3_too(bundle, cluster, tmp_path):
    out = f"s3://scalp/{tmp_path.name}/out"
    assert grade(str(bundle), put_source("folder", tmp_path), out)["rows_unaccounted"] == 0
    assert len(by_name(out)) == 12


def test_a_stopped_run_does_only_what_is_left(bundle, cluster, tmp_path, capsys):
    source, out = put_source("folder", tmp_path), tmp_path / "out"
    grade(str(bundle), source, str(out))
    # As if it had been stopped: one file was not written yet.
    (part,) = (out / RESULTS_FOLDER).iterdir()
    table = read_results(str(out / RESULTS_FOLDER))
    kept = table.slice(0, 7)
    storage.write_parquet(str(part), kept)
    (out / "summary.json").unlink()
    summary = grade(str(bundle), source, str(out))
    assert "going on: 7 of 12 photographs are done already" in capsys.readouterr().out
    assert (summary["rows"], summary["rows_unaccounted"]) == (12, 0)
    again = {row["image_id"]: row["graded_at"] for row in read_results(str(out / RESULTS_FOLDER)).to_pylist()}
    for row in kept.to_pylist():
        assert again[row["image_id"]] == row["graded_at"]


def test_a_finished_run_ends_at_once(bundle, cluster, tmp_path, capsys):
    source, out = put_source("folder", tmp_path), str(tmp_path / "out")
    first = grade(str(bundle), source, out)
    assert grade(str(bundle), source, out) == first
    assert "is finished: all 12 photographs are accounted for" in capsys.readouterr().out


def test_one_output_holds_one_bundle_and_one_source(bundle, make_bundle, cluster, tmp_path):
    source, out = put_source("folder", tmp_path), str(tmp_path / "out")
    grade(str(bundle), source, out)
    with pytest.raises(UserError, match="holds results of source .* choose another OUT"):
        grade(str(bundle), put_source("zip", tmp_path), out)


def test_a_row_counted_twice_is_not_called_a_success(bundle, cluster, tmp_path):
    source, out = put_source("folder", tmp_path), tmp_path / "out"
    grade(str(bundle), source, str(out))
    table = read_results(str(out / RESULTS_FOLDER))
    storage.write_parquet(str(out / RESULTS_FOLDER / "part-again.parquet"), table.slice(0, 1))
    (out / "summary.json").unlink()
    for _ in range(2):  # nor when it is asked again
        with pytest.raises(UserError, match="1 of 12 photographs are not accounted for exactly once"):
            grade(str(bundle), source, str(out))


def test_a_member_of_a_damaged_zip_fails_alone(bundle, cluster, tmp_path):
    data = bytearray(zipped({f"{index}.jpg": jpeg(index) for index in range(4)}))
    data[len(data) // 2] ^= 0xFF  # inside one member's bytes
    (tmp_path / "source.zip").write_bytes(bytes(data))
    summary = grade(str(bundle), str(tmp_path / "source.zip"), str(tmp_path / "out"))
    assert (summary["graded"], summary["by_error"]) == (3, {"fetch_failed": 1})
