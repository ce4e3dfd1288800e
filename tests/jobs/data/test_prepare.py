"""`scalp prepare` in this process: files it must not change, resumed runs, and its messages."""

import gzip
import json
import tarfile
from dataclasses import replace
from functools import partial

import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.data import prepare as module
from jobs.data import tasks
from jobs.data.tasks import count_unfetched
from scalp_core import storage
from scalp_core.archives.base import Placed
from scalp_core.curation import queries
from scalp_core.curation.audit import Options
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets import manifest
from scalp_core.errors import ImageError, SourceError, UserError
from scalp_core.storage import outputs, parquet
from tests.support.preparing import picture

prepare = partial(module.prepare, executor=LocalExecutor())
OPTIONS = Options(ratio="1:1:1")


@pytest.fixture
def source(tmp_path):
    for index in range(24):
        storage.write(f"{tmp_path}/set/{index % 4}/{index}.jpg", picture(index))
    return str(tmp_path / "set")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare_and_stop(source, out, monkeypatch):
    """A run that ends before it writes its report."""
    with monkeypatch.context() as stopped:
        stopped.setattr(module.data_report, "render_report", None)
        with pytest.raises(TypeError):
            prepare(source, out, OPTIONS)


def test_files_that_prepare_did_not_make_stay(source, tmp_path):
    out = tmp_path / "thesis"
    for name in ("work/thesis.tex", "report.html", "summary.json", "manifest/split=train/other.parquet"):
        storage.write(f"{out}/{name}", b"mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is not empty .* and was not made by scalp prepare"):
        prepare(source, str(out), OPTIONS)
    for inside in (f"{source}/0", f"{source}/new", str(tmp_path)):
        with pytest.raises(UserError, match="choose an output directory"):
            prepare(source, inside, OPTIONS)
    with pytest.raises(UserError, match="check the path"):
        prepare(str(tmp_path / "missing"), str(tmp_path / "new"), OPTIONS)
    assert contents(tmp_path) == before


@pytest.mark.medium
def test_an_empty_source_leaves_the_output_free_for_another(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="is empty"):
        prepare(str(tmp_path / "empty"), str(tmp_path / "out"), OPTIONS)
    assert prepare(source, str(tmp_path / "out"), OPTIONS)["photographs"] == 24


@pytest.mark.medium
def test_splits_of_a_run_that_was_stopped_do_not_stay(source, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    prepare_and_stop(source, out, monkeypatch)
    assert storage.folders_in(f"{out}/manifest") == {"split=train", "split=val", "split=test"}
    prepare(source, out, Options(task="unlabelled"))
    table = manifest.read_manifest(out)
    assert table.num_rows == 24
    assert set(table["split"].to_pylist()) == {None}


@pytest.mark.medium
def test_retry_failed_reads_unfetched_objects_again(source, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    read = datasets_locations.read_placed

    def away(locations, max_bytes):
        for location, placed in zip(locations, read(locations, max_bytes), strict=True):
            is_away = location.uri.endswith(("/5.jpg", "/6.jpg"))
            yield Placed(ImageError("fetch_failed", "the server did not answer")) if is_away else placed

    with monkeypatch.context() as outage:
        outage.setattr(datasets_locations, "read_placed", away)
        summary = prepare(source, out, OPTIONS)
    assert (summary["photographs"], summary["could_not_be_fetched"]) == (22, 2)
    assert manifest.read_manifest(out).num_rows == 22
    assert prepare(source, out, OPTIONS) == summary
    assert "2 objects could not be fetched; --retry-failed reads them again" in capsys.readouterr().out
    read_again = []

    def counted(work, name):
        read_again.append(count_unfetched(work, name))
        return read_again[-1]

    with monkeypatch.context() as counting:
        counting.setattr(tasks, "count_unfetched", counted)
        summary = prepare(source, out, OPTIONS, retry_failed=True)
    assert (summary["photographs"], summary["could_not_be_fetched"]) == (24, 0)
    assert sorted(read_again) == [0] * (len(read_again) - 2) + [1, 1]  # two shards had one each
    assert manifest.read_manifest(out).num_rows == 24
    assert not parquet.read(f"{out}/{queries.DROPPED_FILE}").num_rows
    assert not outputs.has_scratch(out)
    assert json.loads(storage.read(f"{out}/summary.json")) == summary
    # Nothing is left to retry: the finished run stays as it is.
    with monkeypatch.context() as idle:
        idle.setattr(module, "list_roots", None)
        idle.setattr(module, "examine_shard", None)
        assert prepare(source, out, OPTIONS, retry_failed=True) == summary
    assert manifest.read_manifest(out).num_rows == 24


def test_a_source_is_read_again_after_a_refused_run_was_killed_in_its_cleanup(source, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    for index in range(4):
        storage.write(f"{tmp_path}/new/unsorted/{index}.jpg", picture(index))
    with monkeypatch.context() as killed:
        killed.setattr(outputs, "remove_scratch", lambda _: None)
        with pytest.raises(SourceError, match="4 images and no grade"):
            prepare(str(tmp_path / "new"), out, OPTIONS)
    assert outputs.has_scratch(out)
    assert prepare(source, out, OPTIONS)["photographs"] == 24


@pytest.mark.medium
def test_groups_come_from_names_when_asked_and_not_from_two_places(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    summary = prepare(source, out, replace(OPTIONS, group_by=r"regex:(\d)\d*\.jpg"))
    groups = manifest.read_manifest(out)["group"].to_pylist()
    assert set(groups) == set("0123456789")
    assert summary["photographs"] == 24
    with pytest.raises(UserError, match="another group_by; choose another output directory"):
        prepare(source, out, replace(OPTIONS, group_by="folder"))
    with pytest.raises(UserError, match="--group-by patient is unknown"):
        prepare(source, str(tmp_path / "other"), replace(OPTIONS, group_by="patient"))
    prepare(source, str(tmp_path / "folders"), replace(OPTIONS, group_by="folder"))
    assert "24 images have no group by --group-by" in capsys.readouterr().out
    storage.write(f"{tmp_path}/t.csv", b"uri,label,group\nset/0/0.jpg,1,anna\n")
    with pytest.raises(UserError, match="has a column group; omit one"):
        prepare(str(tmp_path / "t.csv"), str(tmp_path / "other"), replace(OPTIONS, group_by="folder"))


@pytest.mark.medium
def test_groups_of_an_unfinished_run_are_made_again(source, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    prepare_and_stop(source, out, monkeypatch)
    prepare(source, out, replace(OPTIONS, group_by=r"regex:(\d)\d*\.jpg"))
    assert set(manifest.read_manifest(out)["group"].to_pylist()) == set("0123456789")


def test_a_compressed_tar_is_refused_with_the_way_out_and_a_plain_one_is_read(source, tmp_path):
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        archive.add(source, "set")
    plain = (tmp_path / "plain.tar").read_bytes()
    for name in ("packed.tar.gz", "also-packed.tar"):
        storage.write(f"{tmp_path}/tars/{name}", gzip.compress(plain))
    storage.write(f"{tmp_path}/tars/plain.tar", plain)
    out = f"{tmp_path}/out"
    assert prepare(f"{tmp_path}/tars", out, OPTIONS)["photographs"] == 24
    dropped = parquet.read(f"{out}/dropped.parquet").to_pylist()
    assert [(row["uri"].rsplit("/", 1)[-1], row["reason"]) for row in dropped] == [
        ("also-packed.tar", "bad_archive"), ("packed.tar.gz", "bad_archive")
    ]  # fmt: skip
    assert all("unpack it, or repack it as .zip or plain .tar" in row["detail"] for row in dropped)
