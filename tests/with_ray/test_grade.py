"""Bulk grading against real files and a real S3 server: every photograph accounted for, once."""

import csv
import io
import json
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.common import ray_executor
from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.grade import driver as grade_module
from jobs.grade.driver import GradeOptions, grade
from jobs.grade.gather import Gathering
from jobs.grade.planning import PoolOptions
from scalp_core import storage
from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.inference.predictor import resolve_precision
from scalp_core.results.schema import RESULTS_FOLDER, SCHEMA
from scalp_core.storage import outputs
from tests.support import sockets
from tests.support.images import jpeg
from tests.support.result_rows import read_results
from tests.support.sources import audited_jpegs

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


def tarred(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SMALL_SHARDS = PoolOptions(shard_size=4)
HOPELESS = 260  # files; a run judges the first 200
# Accounts, refusals and archives do not depend on where the tasks run.
grade_alone = partial(grade, executor=LocalExecutor())
QUICK = GradeOptions(heatmaps=0)  # heatmaps need PyTorch, which takes seconds to import


def put_files(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


KINDS = ["folder", "zip", "tar", "csv", "parquet", "s3 zip", "s3 tar.gz", "s3 prefix"]
TABLES = ("csv", "parquet")


def put_source(kind: str, tmp_path: Path) -> str:
    """Write `FILES` to a folder with the name of the kind, local or in S3; return the source."""
    folder = tmp_path / kind
    folder.mkdir()
    prefix = f"s3://scalp/{tmp_path.name}/{kind}"
    if kind == "folder":
        return str(put_files(folder))
    if kind in TABLES:
        put_files(folder)
        # The last names one of them again.
        uris = [name for name in FILES if name != "notes.txt"] + ["empty.jpg"]
        table = folder / f"table.{kind}"
        if kind == "csv":
            with table.open("w", newline="") as file:
                csv.writer(file).writerows([["uri"], *([uri] for uri in uris)])
        else:
            pq.write_table(pa.table({"uri": uris, "visit": range(len(uris))}), table)
        return str(table)
    if kind == "s3 prefix":
        for name, content in FILES.items():
            storage.write(f"{prefix}/{name}", content)
        return prefix
    name, data = {
        "zip": ("source.zip", zipped(FILES)),
        "tar": ("source.tar", tarred(FILES, "w")),
        "s3 zip": ("source.zip", zipped(FILES)),
        "s3 tar.gz": ("source.tar.gz", tarred(FILES)),
    }[kind]
    uri = f"{prefix}/{name}" if kind.startswith("s3") else str(folder / name)
    storage.write(uri, data)
    return uri


def by_name(rows: list[dict]) -> dict[str, dict]:
    named = {(row["member"] or row["uri"]).rsplit("/", 1)[-1]: row for row in rows}
    assert len(named) == len(rows)
    return named


def rows_of(out: str) -> list[dict]:
    return read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()


class Run(NamedTuple):
    """A run in Ray over a source of each kind, with its output in S3."""

    out: str
    summary: dict[str, Any]
    rows: dict[str, dict[str, dict]]  # by kind and name of the image
    listening: set[sockets.Listening]


@pytest.fixture(scope="module")
def run(bundle, cluster, tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("kinds")
    named, out = [put_source(kind, root) for kind in KINDS], f"s3://scalp/{root.name}/out"
    before = sockets.listening()  # of an endpoint that other tests started
    with sockets.watched() as listening:
        summary = grade(str(bundle), named, out, GradeOptions(pool=SMALL_SHARDS, heatmaps=0))
    rows = rows_of(out)
    by_kind = {kind: by_name([row for row in rows if f"/{kind}/" in row["uri"]]) for kind in KINDS}
    assert sum(map(len, by_kind.values())) == len(rows)
    return Run(out, summary, by_kind, listening - before)


def test_a_run_over_sources_of_all_kinds_accounts_for_each_file(run):
    kinds, tables = len(KINDS), len(TABLES)
    summary = run.summary
    assert (summary["rows"], summary["graded"], summary["failed"]) == (12 * kinds, 9 * kinds, 3 * kinds)
    assert (summary["rows_unaccounted"], summary["other_files"]) == (0, kinds - tables)
    assert summary["repeated"] == tables
    assert summary["drift"]["level"] == "too_few"
    assert json.loads(storage.read(f"{run.out}/summary.json")) == summary
    assert read_results(f"{run.out}/{RESULTS_FOLDER}").schema.equals(SCHEMA)
    assert not outputs.has_scratch(run.out)


def test_a_run_listens_on_loopback_alone(run):
    assert run.listening and not sockets.exposed(run.listening)


@pytest.mark.promise("README: every image has exactly one row")
@pytest.mark.parametrize("kind", KINDS)
def test_every_photograph_of_a_source_becomes_one_row(bundle, run, kind):
    rows = run.rows[kind]
    assert rows.keys() == {name.rsplit("/", 1)[-1] for name in FILES} - {"notes.txt"}
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


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_has_the_same_answer_in_every_kind_of_source(run, kind):
    places = ("location_id", "uri", "member", "graded_at")
    answers = [
        {name: {key: row[key] for key in row if key not in places} for name, row in run.rows[each].items()}
        for each in ("folder", kind)
    ]
    assert answers[0] == answers[1]


def test_prepared_data_and_other_sources_are_graded_together(bundle, tmp_path):
    data = audited_jpegs(tmp_path)
    folder = put_files(tmp_path / "more", {"a.jpg": jpeg(1)})
    summary = grade_alone(str(bundle), [data.data, str(folder)], str(tmp_path / "out"), QUICK)
    assert summary["rows"] == data.table.num_rows + 1
    assert summary["graded"] == summary["rows"]


def test_one_source_inside_another_is_refused(bundle, tmp_path):
    source = put_source("folder", tmp_path)
    with pytest.raises(UserError, match="is inside"):
        grade_alone(str(bundle), [source, f"{source}/session 1"], str(tmp_path / "out"), QUICK)
    with pytest.raises(UserError, match="is in the source"):
        grade_alone(str(bundle), source, f"{source}/out", QUICK)


def test_a_source_without_photographs_does_not_bind_the_output_to_it(bundle, tmp_path):
    empty, out = put_files(tmp_path / "empty", {"notes.txt": b"none"}), str(tmp_path / "out")
    with pytest.raises(UserError, match="contains no image"):
        grade_alone(str(bundle), str(empty), out, QUICK)
    assert grade_alone(str(bundle), put_source("zip", tmp_path), out, QUICK)["rows"] == 12


class StopError(Exception):
    """As if the driver had been killed."""


@pytest.fixture
def stopped(bundle, cluster, tmp_path, monkeypatch):
    """Source and output of a run whose shards are all committed, but nothing else."""

    def stop(*arguments):
        raise StopError

    source, out = put_source("folder", tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Gathering, "finish", stop)
        with pytest.raises(StopError):
            grade_alone(str(bundle), source, str(out), GradeOptions(pool=SMALL_SHARDS, heatmaps=0))
    shards = sorted((out / outputs.SCRATCH_FOLDER / "graded").rglob("*.parquet"))
    assert len(shards) == 3
    return source, out, shards


@pytest.mark.promise("README: a stopped run resumes")
@pytest.mark.promise("README: a killed grading resumes")
def test_a_stopped_run_does_only_what_is_left(bundle, stopped, capsys):
    source, out, shards = stopped
    kept = pa.concat_tables([pq.read_table(shard) for shard in shards[1:]])
    shards[0].unlink()
    summary = grade(str(bundle), source, str(out), QUICK)
    assert "resuming: 8 images are already graded" in capsys.readouterr().out
    assert (summary["rows"], summary["rows_unaccounted"]) == (12, 0)
    assert [session["photographs"] for session in summary["sessions"]] == [12, 4]
    again, before = (
        {row["location_id"]: row["graded_at"] for row in table.to_pylist()}
        for table in (read_results(str(out / RESULTS_FOLDER)), kept)
    )
    assert before.items() < again.items()


@pytest.mark.promise("README: a missing or repeated row is an error")
def test_a_row_counted_twice_is_not_called_a_success(bundle, stopped):
    source, out, shards = stopped
    pq.write_table(pq.read_table(shards[0]), shards[1])
    for _ in range(2):  # nor when it is asked again
        with pytest.raises(UserError, match="images are not accounted for exactly once"):
            grade_alone(str(bundle), source, str(out), QUICK)


def test_a_tar_that_was_read_in_part_goes_on_there(bundle, cluster, tmp_path, monkeypatch):
    files = {f"{index}.jpg": jpeg(index, size=(64, 48)) for index in range(10)} | {"z.txt": b"none"}
    (tmp_path / "a.tar.gz").write_bytes(tarred(files))
    out = tmp_path / "out"

    def stop(*arguments):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Gathering, "finish", stop)
        with pytest.raises(StopError):
            grade_alone(
                str(bundle), str(tmp_path / "a.tar.gz"), str(out), GradeOptions(pool=SMALL_SHARDS, heatmaps=0)
            )
    pieces = sorted((out / outputs.SCRATCH_FOLDER / "graded").rglob("*.parquet"))
    assert len(pieces) == 3
    pieces[1].unlink()
    (end,) = (out / outputs.SCRATCH_FOLDER / "ended").rglob("*.json")
    end.unlink()
    summary = grade_alone(str(bundle), str(tmp_path / "a.tar.gz"), str(out), QUICK)
    assert (summary["rows"], summary["rows_unaccounted"], summary["other_files"]) == (10, 0, 1)
    assert [session["photographs"] for session in summary["sessions"]] == [10, 4]


@pytest.mark.promise("README: a finished run ends immediately")
def test_a_finished_run_ends_at_once(bundle, cluster, tmp_path, capsys, monkeypatch):
    source, out = put_source("folder", tmp_path), str(tmp_path / "out")
    first = grade_alone(str(bundle), source, out, QUICK)

    def refuse():
        raise AssertionError("a finished run needs no Ray")

    monkeypatch.setattr(ray_executor, "connect", refuse)
    assert grade(str(bundle), source, out, QUICK) == first
    assert "is finished: all 12 images are accounted for" in capsys.readouterr().out


def test_a_run_that_was_stopped_before_its_report_has_one_after_the_next_call(
    bundle, cluster, tmp_path, monkeypatch
):
    source, out = put_source("folder", tmp_path), tmp_path / "out"

    call = LocalExecutor.call

    def stop_report(self, function, *arguments):
        if function is grade_module._report:
            raise StopError
        return call(self, function, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "call", stop_report)
        with pytest.raises(StopError):
            grade_alone(str(bundle), source, str(out))
    summary = grade_alone(str(bundle), source, str(out))
    assert summary["rows_unaccounted"] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        ".scalp-lease", "report.html", "results", "run.json", "scalp.json", "summary.json",
    ]  # fmt: skip


@pytest.mark.promise("README: one output holds one bundle")
def test_one_output_holds_one_bundle_and_the_same_sources_and_options(bundle, cluster, tmp_path):
    source, out = put_source("folder", tmp_path), str(tmp_path / "out")
    grade_alone(str(bundle), source, out, QUICK)
    with pytest.raises(UserError, match="holds results of sources .* choose another OUT"):
        grade_alone(str(bundle), put_source("zip", tmp_path), out, QUICK)
    changed = tmp_path / "changed"
    content = load_bundle(str(bundle))
    content.fetch("weights").fetch("float")
    save_bundle(str(changed), content.spec.model_copy(update={"temperature": 2.0}), content.files)
    with pytest.raises(UserError, match="holds results of bundle"):  # the same weights, other answers
        grade_alone(str(changed), source, out, QUICK)
    fp32 = GradeOptions(ModelOptions("cpu", "fp32"), heatmaps=0)
    if resolve_precision("auto", "cpu") == "fp32":
        grade_alone(str(bundle), source, out, fp32)
    else:
        with pytest.raises(UserError, match="holds results of precision bf16, not fp32"):
            grade_alone(str(bundle), source, out, fp32)


def refuse(*_):
    raise UserError("node-7 cannot compute as this run does")


def test_a_model_that_refuses_its_machine_ends_the_run(bundle, cluster, tmp_path):
    source, out = put_source("folder", tmp_path), str(tmp_path / "out")
    with pytest.raises(UserError, match="node-7 cannot compute as this run does"):
        grade(str(bundle), source, out, QUICK, make_model=refuse)


@pytest.mark.promise("README: failed rows are graded again")
def test_failed_rows_are_graded_again_and_no_others(bundle, cluster, tmp_path, capsys):
    source, out = Path(put_source("folder", tmp_path)), str(tmp_path / "out")
    again = GradeOptions(pool=SMALL_SHARDS, retry_failed=True, heatmaps=0)
    grade_alone(str(bundle), str(source), out, QUICK)
    before = by_name(rows_of(out))
    (source / "cut.jpg").write_bytes(jpeg(1))
    (source / "empty.jpg").unlink()
    summary = grade_alone(str(bundle), str(source), out, again)
    assert (summary["rows"], summary["graded"], summary["rows_unaccounted"]) == (12, 10, 0)
    assert summary["by_error"] == {"not_an_image": 1, "not_found": 1}
    assert [session["photographs"] for session in summary["sessions"]] == [12, 3]
    after = by_name(rows_of(out))
    assert list(after) == list(before)  # in their old places
    assert {name for name in after if after[name] != before[name]} == set(BAD)
    assert not outputs.has_scratch(out)


def test_a_retry_that_was_stopped_is_ended_by_the_next_run(bundle, cluster, tmp_path, monkeypatch):
    source, out = Path(put_source("folder", tmp_path)), str(tmp_path / "out")
    grade_alone(str(bundle), str(source), out, QUICK)
    (source / "cut.jpg").write_bytes(jpeg(1))

    def stop(*arguments):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(grade_module.grade_retry, "merge", stop)
        with pytest.raises(StopError):
            grade_alone(str(bundle), str(source), out, GradeOptions(retry_failed=True, heatmaps=0))
    summary = grade_alone(str(bundle), str(source), out, QUICK)  # unasked: it began
    assert (summary["rows"], summary["graded"], summary["rows_unaccounted"]) == (12, 10, 0)


def test_a_hopeless_source_is_told_early_and_may_be_graded_all_the_same(bundle, cluster, tmp_path):
    files = {f"{index:04d}.jpg": b"this is a text" for index in range(HOPELESS)}
    source, out = put_files(tmp_path / "source", files), str(tmp_path / "out")
    few = PoolOptions(shard_size=20)
    with pytest.raises(UserError, match="of the first .* failed .not_an_image .* --retry-failed"):
        grade(str(bundle), str(source), out, GradeOptions(pool=few, heatmaps=0))
    summary = grade_alone(
        str(bundle), str(source), out, GradeOptions(pool=few, max_failed_share=1, heatmaps=0)
    )
    assert (summary["failed"], summary["rows_unaccounted"]) == (HOPELESS, 0)
    (source / "0000.jpg").write_bytes(jpeg(1))  # that the others fail again is no news
    summary = grade_alone(
        str(bundle), str(source), out, GradeOptions(pool=few, retry_failed=True, heatmaps=0)
    )
    assert (summary["failed"], summary["graded"], summary["rows_unaccounted"]) == (HOPELESS - 1, 1, 0)


def test_a_member_of_a_damaged_zip_fails_alone(bundle, cluster, tmp_path):
    data = bytearray(zipped({f"{index}.jpg": jpeg(index) for index in range(4)}))
    data[len(data) // 2] ^= 0xFF  # inside one member's bytes
    (tmp_path / "source.zip").write_bytes(bytes(data))
    summary = grade_alone(str(bundle), str(tmp_path / "source.zip"), str(tmp_path / "out"), QUICK)
    assert (summary["graded"], summary["by_error"]) == (3, {"fetch_failed": 1})


def test_what_may_hide_photographs_is_a_failed_row(bundle, cluster, tmp_path):
    sound = zipped({"a.jpg": jpeg(1)})
    files = {
        "damaged.zip": sound[:-30],
        "cut.tar.gz": tarred({f"{index}.jpg": jpeg(index) for index in range(6)})[:100_000],
        "outer.zip": zipped({"inner.zip": sound, "b.jpg": jpeg(2)}),
        "outer.tar": tarred({"inner.tar": b"", "c.jpg": jpeg(3)}, "w"),
    }
    out = str(tmp_path / "out")
    summary = grade_alone(str(bundle), str(put_files(tmp_path / "source", files)), out, QUICK)
    assert summary["rows_unaccounted"] == 0
    assert summary["by_error"] == {"bad_archive": 2, "nested_archive": 2}
    rows = read_results(f"{out}/{RESULTS_FOLDER}").to_pylist()
    graded = sorted(row["member"] for row in rows if row["status"] == "graded")
    assert {"b.jpg", "c.jpg", "0.jpg"} <= set(graded)
    assert {Path(row["uri"]).name for row in rows if row["error_code"] == "bad_archive"} == {
        "damaged.zip", "cut.tar.gz",
    }  # fmt: skip
