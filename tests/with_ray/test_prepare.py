"""`scalp prepare` as it is run: in Ray's workers, on S3, stopped, and again."""

import io
import json
import re
import tarfile
from functools import partial

import pytest

from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.data.prepare_summary import REPORT_FILE, check_accounts
from jobs.evaluate.driver import collect_columns
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.storage import parquet
from scalp_core.storage.outputs import SCRATCH_FOLDER
from tests.support.sources import PLANS, audited, folder_of, picture, write_set

OPTIONS = Options(ratio="2:1:1")
# What a stopped run resumes with, and refusals, do not depend on where the tasks run.
prepare_alone = partial(prepare, executor=LocalExecutor())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepare") / "set"
    write_set(root, "zipped")
    (root / "Training" / "[원천]미세각질_1.경증").mkdir()
    (root / "Training" / "[원천]미세각질_1.경증" / "text.jpg").write_bytes(b"a text")
    return root


@pytest.fixture(scope="module")
def prepared(source, cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    return out, prepare(str(source), str(out), OPTIONS)


def test_rays_workers_come_to_what_one_process_comes_to(prepared, source, tmp_path):
    out, summary = prepared
    alone = audited(source, tmp_path, ratio="2:1:1")
    assert manifest.read_manifest(str(out)).equals(manifest.read_manifest(alone.data))
    for name in ("objects", "dropped", "findings", "parts", "by", "grouped_by"):
        assert json.loads(json.dumps(alone.summary[name])) == summary[name]


@pytest.mark.promise("README: no image is dropped without a reason")
def test_every_object_is_accounted_for_and_the_summary_says_where(prepared):
    out, summary = prepared
    assert summary["objects_listed"] == sum(summary["objects"].values())
    assert summary["objects"]["photograph"] == summary["photographs"] + sum(summary["dropped"].values())
    assert summary["dropped"]["not_an_image"] == 1
    dropped = parquet.read(str(out / "dropped.parquet")).to_pylist()
    assert len(dropped) == sum(summary["dropped"].values())
    assert json.loads((out / "summary.json").read_text()) == summary
    assert not (out / SCRATCH_FOLDER).exists()


def test_what_is_not_accounted_for_ends_the_command(prepared):
    _, summary = prepared
    check_accounts(summary, "OUT")
    lost = summary["objects_listed"] + 1
    with pytest.raises(UserError, match=f"{lost} objects were listed in .* but {lost - 1} examined"):
        check_accounts(summary | {"objects_listed": lost}, "OUT")
    with pytest.raises(UserError, match="images were found in .* kept and .* dropped in OUT"):
        check_accounts(summary | {"photographs": summary["photographs"] - 1}, "OUT")


def test_the_report_stands_alone_and_shows_what_matters(prepared):
    out, summary = prepared
    page = (out / REPORT_FILE).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # asks nobody for anything
    assert "<script" not in page
    assert page.count("<img") >= 4
    assert summary["sha256"] in page
    for word in ("not_an_image", "content_in_several_symptoms", "3 severe", "중등도", "position on the head"):
        assert word in page


@pytest.mark.promise("README: a finished run ends immediately")
def test_the_same_command_again_ends_at_once_and_another_is_refused(prepared, source):
    out, summary = prepared
    before = (out / "data.json").stat().st_mtime_ns
    assert prepare(str(source), str(out), OPTIONS) == summary
    assert (out / "data.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another seed; choose another output directory"):
        prepare(str(source), str(out), Options(ratio="2:1:1", seed=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(symptom="각질"), "--symptom 각질 is unknown; give one of micro_keratin, excess_sebum"),
        (Options(keys=("person",)), "--group person is unknown; give some of device,session,near_duplicate"),
        (Options(ratio="7:2"), "--ratio 7:2"),
        (Options(folds=100), "groups cannot be divided into 100"),
    ],
)
def test_options_that_make_no_sense_name_the_way_out(source, cluster, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        prepare_alone(str(source), str(tmp_path / "out"), options)


@pytest.mark.promise("README: a stopped run resumes")
def test_a_run_that_was_stopped_goes_on_with_what_is_left(source, cluster, tmp_path, monkeypatch):
    """What the examining tasks wrote is there already: none of it is read again."""
    out = tmp_path / "out"
    with monkeypatch.context() as stopped:
        stopped.setattr("jobs.data.prepare._audit", None)
        with pytest.raises(TypeError):
            prepare_alone(str(source), str(out), OPTIONS)
    examined = {path: path.stat().st_mtime_ns for path in (out / SCRATCH_FOLDER / "examined").iterdir()}
    assert len(examined) > 1
    gone = examined.popitem()[0]
    gone.unlink()
    with monkeypatch.context() as kept:
        kept.setattr(storage, "remove_folder", lambda *_, **__: None)
        summary = prepare(str(source), str(out), OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in examined} == examined
    assert gone.exists()
    assert summary["objects_listed"] == sum(summary["objects"].values())


def test_other_options_on_what_is_not_finished_read_nothing_again(source, cluster, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="groups cannot be divided into 100"):
        prepare_alone(str(source), str(out), Options(folds=100))
    examined = {path: path.stat().st_mtime_ns for path in (out / SCRATCH_FOLDER / "examined").iterdir()}
    with monkeypatch.context() as kept:
        kept.setattr(storage, "remove_folder", lambda *_, **__: None)
        prepare_alone(str(source), str(out), OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in examined} == examined


def test_a_source_without_grades_is_read_anew_when_it_was_mended(cluster, tmp_path):
    source = tmp_path / "set"
    for index in range(12):
        folder = source / "unsorted" / str(index % 4)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x").mkdir(exist_ok=True)
        (folder / "x" / f"{index}.jpg").write_bytes(picture(index))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="12 images and no grade"):
        prepare_alone(str(source), out, Options(ratio="1:1:1"))
    for path in list(source.rglob("*.jpg")):
        path.rename(path.parents[1] / path.name)
    assert prepare_alone(str(source), out, Options(ratio="1:1:1"))["photographs"] == 12


def test_a_table_that_is_none_is_told_in_one_line(cluster, tmp_path):
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(UserError, match="t.csv cannot be read as a table: Empty CSV file"):
        prepare(str(tmp_path / "t.csv"), str(tmp_path / "out"))


def test_from_s3_to_s3_and_the_photographs_are_graded_from_there(source, s3, cluster, bundle, tmp_path):
    """A tar in a prefix, beside plain files; the manifest lies in S3 too."""
    prefix = "s3://scalp/prepare/source"
    tarred, plain = PLANS[:24], PLANS[24:]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for plan in tarred:
            info = tarfile.TarInfo(f"{folder_of(plan)}/{plan.stem}.jpg")
            info.size = len(picture(plan.index))
            archive.addfile(info, io.BytesIO(picture(plan.index)))
    storage.write(f"{prefix}/first.tar", buffer.getvalue())
    for plan in plain:
        name = f"{prefix}/{folder_of(plan)}/{plan.stem}.jpg"
        storage.write(name, picture(plan.index))
    summary = prepare(prefix, "s3://scalp/prepare/data", OPTIONS)
    assert summary["photographs"] == len(PLANS)
    table = manifest.read_manifest("s3://scalp/prepare/data")
    assert sum(member is not None for member in table["member"].to_pylist()) == len(tarred)
    assert storage.exists("s3://scalp/prepare/data/report.html")
    assert storage.is_empty(storage.join("s3://scalp/prepare/data", SCRATCH_FOLDER))
    columns, _ = collect_columns(load_bundle(str(bundle)), table, ModelOptions("cpu"))
    logits = columns["logits"]
    assert logits.shape == (len(PLANS), 4)
