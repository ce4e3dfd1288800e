"""Resumed and refused grading runs, in this process, without Ray."""

import json
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from cluster.resources import Cluster
from jobs.common import images, provenance
from jobs.common.console import read_json, timed
from jobs.common.inference import ModelOptions
from jobs.common.local_executor import LocalExecutor
from jobs.grade import gather as grade_gather
from jobs.grade import listing as grade_listing
from jobs.grade.driver import with_runtime
from jobs.grade.files import GroupState, Listed, Listing, read_listed_rows
from jobs.grade.gather import GatherGroups, Gathering, count_differing
from jobs.grade.identity import Identity
from jobs.grade.listing import write_groups
from jobs.grade.planning import PoolOptions, plan_run
from jobs.grade.run import Run
from scalp_core import storage
from scalp_core.bundles.bundle import read_spec
from scalp_core.bundles.contract import GraphRecord
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Registry
from scalp_core.errors import UserError
from scalp_core.inference import predictor
from scalp_core.inference.predictor import COMPILE_FROM
from scalp_core.results import progress
from scalp_core.storage import lease, outputs
from tests.support import small_grade
from tests.support.small_grade import picture, rows, run, sources, tarred, write_bundle, zipped

TEMPORARY = f".{{}}.{'0' * 32}.scalp-tmp"


class StopError(Exception):
    """Simulates a killed driver."""


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(str(tmp_path / "bundle"))


@pytest.fixture
def stopped(monkeypatch):
    """Run until all shards are graded."""

    def stop(bundle, named, out, **options):
        def finish(_):
            raise StopError

        with monkeypatch.context() as patch:
            patch.setattr(Gathering, "finish", finish)
            with pytest.raises(StopError):
                run(bundle, named, out, report=False, **options)

    yield stop


def files_below(folder: Path):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what OUT is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["work", "retry", ".scalp-work"])
def test_a_source_in_the_output_is_refused_and_kept(bundle, tmp_path, name):
    source = tmp_path / "clinic" / name
    source.mkdir(parents=True)
    (source / "original.heic").write_bytes(b"an original")
    with pytest.raises(UserError, match="is in OUT"):
        run(bundle, [str(source)], str(tmp_path / "clinic"))
    assert (source / "original.heic").read_bytes() == b"an original"


@pytest.mark.parametrize("name", ["b.jpg", "work/mine.txt", ".scalp-work/mine.txt", "results/part-0.parquet"])
def test_an_output_that_holds_something_else_is_refused_and_kept(bundle, tmp_path, name):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(picture(0))
    path = tmp_path / "out" / name  # such as the second source, with OUT forgotten
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="is not empty"):
        run(bundle, [str(tmp_path / "source")], str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == {path: b"mine"}


def test_a_second_run_is_refused_while_one_runs(bundle, tmp_path):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    with outputs.open_output(out, "grade"), pytest.raises(UserError, match="is in use by scalp grade"):
        run(bundle, named, out, report=False)
    assert run(bundle, named, out, report=False)["rows_unaccounted"] == 0


def test_a_run_that_was_taken_over_replaces_no_part(bundle, tmp_path, stopped):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    stopped(bundle, named, out)
    work = storage.join(out, outputs.SCRATCH_FOLDER)
    listing = grade_listing.read_listing(work)
    group = next(group for group in listing.groups if not group.tars)
    item = (0, [group])
    with lease.hold(out, "grade") as guard:
        task = GatherGroups(out, work, listing, guard)
        task(item)
        (part,) = (tmp_path / "out" / "results").iterdir()
        whole = part.read_bytes()
        # Another run has finished, and removes what this one still reads.
        next((tmp_path / "out" / outputs.SCRATCH_FOLDER / "graded" / group.group).iterdir()).unlink()
        assert task(item).unaccounted > 0
        assert part.read_bytes() == whole
    stale = replace(task, guard=replace(guard, epoch=0))
    with pytest.raises(UserError, match="taken over by another run"):
        stale._write(0, 0, [pq.read_table(part)])


class Eager(LocalExecutor):
    """Runs a submitted step at once, as a cluster with free cores does."""

    def submit(self, function, *arguments):
        result = function(*arguments)
        return lambda: result


def test_a_part_is_gathered_as_soon_as_its_shards_are_graded(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(grade_listing, "GROUP_SHARDS", 2)
    monkeypatch.setattr(grade_gather, "ROWS_PER_PART", 2 * small_grade.SHARD)
    for number in range(6 * small_grade.SHARD):
        storage.write(f"{tmp_path}/data/{number}.jpg", picture(number))
    out, graded_at_each_part = tmp_path / "out", []

    def write_part(uri, table):
        graded = sum(1 for _ in (out / outputs.SCRATCH_FOLDER / "graded").rglob("*.parquet"))
        graded_at_each_part.append(graded)
        parts(uri, table)

    parts = grade_gather.write_part
    monkeypatch.setattr(grade_gather, "write_part", write_part)
    monkeypatch.setattr(small_grade, "LocalExecutor", Eager)
    summary = run(bundle, [f"{tmp_path}/data"], str(out), report=False)
    assert (summary["rows"], summary["rows_unaccounted"]) == (6 * small_grade.SHARD, 0)
    assert graded_at_each_part == [2, 4, 6]


def test_leftovers_of_killed_writers_disturb_nothing(bundle, tmp_path, stopped):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    stopped(bundle, named, out)
    scratch = tmp_path / "out" / outputs.SCRATCH_FOLDER
    (tmp_path / "out" / "results").mkdir()
    (group, *_) = (scratch / "graded").iterdir()
    for folder in (group, scratch / "sessions", tmp_path / "out" / "results", tmp_path / "out"):
        (folder / TEMPORARY.format("0003.parquet")).write_bytes(b"half of it")
    assert progress.read_progress(out).done == 11  # a tar's shadowed member too
    assert run(bundle, named, out, report=False)["rows_unaccounted"] == 0
    assert not list((tmp_path / "out").rglob("*.scalp-tmp"))


def test_the_rate_of_a_session_that_was_stopped_at_once_is_a_number(tmp_path):
    files = {
        progress.IDENTITY_FILE: {"sources": ["/d"], "model_version": "stub-1"},
        f"{outputs.SCRATCH_FOLDER}/sessions/a.json": {"photographs": 3, "failed": 0, "seconds": 0.0},
    }
    for name, content in files.items():
        storage.write(f"{tmp_path}/out/{name}", json.dumps(content).encode())
    assert progress.read_progress(f"{tmp_path}/out").photographs_per_second == 30


# --- sources that change ------------------------------------------------------------------------------------


def test_a_tar_that_changed_between_sessions_is_graded_as_it_is_now(bundle, tmp_path, stopped):
    path, out = tmp_path / "a.tar", str(tmp_path / "out")
    path.write_bytes(tarred([(f"old{number}.jpg", picture(number)) for number in range(8)]))
    stopped(bundle, [str(path)], out)
    next((tmp_path / "out" / outputs.SCRATCH_FOLDER / "ended").rglob("*.json")).unlink()
    path.write_bytes(tarred([(f"new{number}.jpg", picture(number)) for number in range(4)]))
    summary = run(bundle, [str(path)], out, report=False)
    assert (summary["rows"], summary["rows_unaccounted"]) == (4, 0)
    assert sorted(row["member"] for row in rows(out)) == [f"new{number}.jpg" for number in range(4)]


def test_members_of_a_zip_that_changed_between_sessions_say_so(bundle, tmp_path, stopped):
    path, out = tmp_path / "a.zip", str(tmp_path / "out")
    path.write_bytes(zipped([(f"{number}.jpg", picture(number)) for number in range(4)]))
    stopped(bundle, [str(path)], out)
    for shard in (tmp_path / "out" / outputs.SCRATCH_FOLDER / "graded").rglob("0000.parquet"):
        shard.unlink()
    path.write_bytes(zipped([(f"{number}.jpg", picture(number + 10)) for number in range(4)]))
    summary = run(bundle, [str(path)], out, report=False)
    assert (summary["by_error"], summary["rows_unaccounted"]) == ({"changed": 3}, 0)
    summary = run(bundle, [str(path)], out, retry=True, report=False)
    assert (summary["failed"], summary["rows"], summary["rows_unaccounted"]) == (0, 4, 0)


@pytest.mark.promise("README: a missing or repeated row is an error")
def test_rows_too_many_do_not_make_up_for_rows_too_few():
    assert count_differing(["a", "b"], ["a"]) + count_differing(["c"], ["c", "d"]) == 4
    assert count_differing(["a", "b"], ["a", "b"]) == 0


def test_repeated_rows_are_dropped_by_a_task_that_may_run_again(tmp_path):
    objects = [
        {"uri": f"/d/{number % 100}.jpg", "member": None, "code": None, "kind": "photograph"}
        for number in range(300)
    ]
    groups = [group for group in write_groups(f"{tmp_path}/listed", 32, 0, objects) if group.photographs]
    (unique,) = first = grade_listing.write_unique(str(tmp_path / "listed"), groups, 32)
    assert first == grade_listing.write_unique(str(tmp_path / "listed"), groups, 32)
    assert unique.photographs == 100
    state = GroupState(str(tmp_path), Listing((unique,), 32, "listed"), unique)
    assert [state.count_listed(shard) for shard in state.pending] == [32, 32, 32, 4]
    assert [row["uri"] for row in read_listed_rows(str(tmp_path / "listed"), unique)] == [
        f"/d/{number}.jpg" for number in range(100)
    ]


def test_any_exception_of_one_image_is_its_row(bundle, tmp_path, monkeypatch):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    decode = images.decode

    def odd(data, spec):
        if data == picture(0):
            raise ZeroDivisionError("nobody expects this")
        return decode(data, spec)

    monkeypatch.setattr(images, "decode", odd)
    summary = run(bundle, named, out, report=False)
    assert (summary["by_error"], summary["rows_unaccounted"]) == ({"empty": 1, "internal_error": 1}, 0)
    (row,) = (row for row in rows(out) if row["error_code"] == "internal_error")
    assert row["error"] == "ZeroDivisionError: nobody expects this"


# --- what an output belongs to ------------------------------------------------------------------------------


def test_sources_in_another_order_are_the_same(bundle, tmp_path):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    summary = run(bundle, named, out, report=False)
    assert run(bundle, named[::-1], out) == summary
    with pytest.raises(UserError, match="holds results of sources .* choose another OUT"):
        run(bundle, named[:1], out)


def test_a_graph_that_is_added_to_a_bundle_does_not_lock_the_output(bundle, tmp_path):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    summary = run(bundle, named, out, report=False)
    record = GraphRecord(
        xml_sha256="0" * 64, weights_sha256="0" * 64, photographs=1, max_logit_difference=0.0,
        grade_agreement=1.0, qwk_drop=0.0, openvino="2026",
    )  # fmt: skip
    assert run(write_bundle(bundle, graphs={"int8": record}), named, out) == summary
    write_bundle(bundle, temperature=2.0)  # the same weights, other answers
    with pytest.raises(UserError, match=r"holds results of bundle .*, which has another temperature; choose"):
        run(bundle, named, out)


def test_a_run_resumes_with_the_version_that_it_began_with(bundle, tmp_path, monkeypatch, stopped):
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))
    registry = Registry(str(tmp_path / "models"))
    registry.add(bundle, "scalp")
    registry.add(write_bundle(str(tmp_path / "second"), temperature=2.0), "scalp")
    registry.promote("scalp", 1)
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    stopped("models://scalp", named, out)
    registry.promote("scalp", 2, untested=True)
    summary = run("models://scalp", named, out, report=False)
    assert (summary["bundle"], summary["rows_unaccounted"]) == ("models://scalp@1", 0)
    with pytest.raises(UserError, match="holds results of bundle"):
        run("models://scalp@2", named, out)


def test_what_ran_is_recorded(bundle, tmp_path):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    summary = run(bundle, named, out, report=False)
    resolved = {"device": "cpu", "precision": "fp32", "runtime": "openvino"}
    assert resolved.items() <= summary["settings"].items()
    recorded = read_json(f"{out}/run.json")
    assert resolved.items() <= recorded.items()
    assert recorded["model_version"] == read_spec(bundle).model_version
    assert set(recorded["versions"]) == {"scalp", "openvino", "simplejpeg", "cykooz-resizer", "pillow"}
    version = provenance.versions()
    by = f"cpu fp32 openvino {version['openvino']}, scalp {version['scalp']}"
    assert summary["computed_by"] == by
    assert {row["computed_by"] for row in rows(out) if row["status"] == "graded"} == {by}


def test_an_output_resumes_as_it_began_on_any_machine(bundle, tmp_path, monkeypatch, stopped):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    auto = ModelOptions()
    monkeypatch.setattr(predictor, "has_bf16", lambda _: False)
    stopped(bundle, named, out, model=auto)
    for shard in (tmp_path / "out" / outputs.SCRATCH_FOLDER / "graded").rglob("0000.parquet"):
        shard.unlink()
    monkeypatch.setattr(predictor, "has_bf16", lambda _: True)  # a newer kind of node
    summary = run(bundle, named, out, report=False, model=auto)
    assert len({row["computed_by"] for row in rows(out) if row["status"] == "graded"}) == 1
    assert (summary["settings"]["precision"], summary["rows_unaccounted"]) == ("fp32", 0)
    for asked, held in [({"precision": "bf16"}, "precision fp32"), ({"runtime": "torch"}, "runtime openvino"),
                        ({"device": "cuda"}, "device cpu")]:  # fmt: skip
        with pytest.raises(UserError, match=f"holds results of {held}, not .*; choose another OUT"):
            run(bundle, named, out, model=ModelOptions(**asked))


def test_a_machine_that_cannot_compute_as_the_run_does_ends_it_in_one_line(bundle, tmp_path, monkeypatch):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    looks = iter([True, True, False])  # resolved and checked where the run begins; the actor's CPU is older
    monkeypatch.setattr(predictor, "has_bf16", lambda _: next(looks))
    with pytest.raises(UserError, match="cannot compute as this run does: its CPU has no bf16; use"):
        run(bundle, named, out, report=False, model=ModelOptions())
    assert not list((tmp_path / "out" / outputs.SCRATCH_FOLDER / "graded").rglob("*.parquet"))
    monkeypatch.setattr(predictor, "has_bf16", lambda _: False)
    with pytest.raises(UserError, match="has no bf16; use machines with bf16, or another OUT"):
        run(bundle, named, out, report=False, model=ModelOptions())
    monkeypatch.setattr(predictor, "has_bf16", lambda _: True)
    assert run(bundle, named, out, report=False, model=ModelOptions())["rows_unaccounted"] == 0


def test_other_versions_of_what_decides_answers_grade_nothing_more(bundle, tmp_path, monkeypatch, stopped):
    named, out = sources(str(tmp_path / "data")), str(tmp_path / "out")
    stopped(bundle, named, out)
    version = metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "9.9" if name == "openvino" else version(name))
        message = (
            f"holds results of openvino {version('openvino')}, not openvino 9.9, whose answers may differ"
        )
        with pytest.raises(UserError, match=message):
            run(bundle, named, out, report=False)
    summary = run(bundle, named, out, report=False)
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "openvino" else version(name))
    assert run(bundle, named, out) == summary  # it is finished
    with pytest.raises(UserError, match="it has openvino 9.9, not .*; install openvino"):
        predictor.check_machine("cpu", "fp32", {"openvino": version("openvino")})


def test_a_run_on_gpus_records_its_runtime_before_any_row(tmp_path, bundle):
    loaded, model = load_bundle(bundle), ModelOptions("cuda", "bf16")
    identity = Identity.of(loaded.spec, bundle, ["/d"], "cuda", model)
    assert identity.runtime == "auto" and "torch" in identity.versions
    storage.write(f"{tmp_path}/out/{progress.IDENTITY_FILE}", b"{}")
    pool = plan_run(Cluster(cpus=4, gpus=1, nodes=1, cores_per_node=4), loaded, model, PoolOptions())
    output = SimpleNamespace(uri=f"{tmp_path}/out")
    begun = Run(output, identity, ["/d"], loaded, model, pool, None, None, None)
    (many,) = (Listed("g", photographs=10 * COMPILE_FROM),)
    assert with_runtime(begun, Listing((many,), 512, "listed")).model.runtime == "torch-compile"
    recorded = read_json(f"{tmp_path}/out/{progress.IDENTITY_FILE}")
    assert recorded["runtime"] == "torch-compile"


def test_files_of_another_version_are_refused_in_one_line(bundle, tmp_path, stopped):
    named, out = sources(str(tmp_path / "data")), tmp_path / "out"
    stopped(bundle, named, str(out))
    listing = out / outputs.SCRATCH_FOLDER / "listing.json"
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps(content | {"schema_version": 1}))
    with pytest.raises(UserError, match="was written by another version of scalp"):
        run(bundle, named, str(out))
    identity = json.loads((out / "run.json").read_text())
    del identity["schema_version"]
    (out / "run.json").write_text(json.dumps(identity))
    with pytest.raises(UserError, match="was written by another version of scalp"):
        run(bundle, named, str(out))


# --- smaller ------------------------------------------------------------------------------------------------


def test_the_seconds_of_a_stage_that_raised_count():
    seconds = {}
    with pytest.raises(ZeroDivisionError), timed(seconds, "model"):
        os.getpid() / 0
    assert seconds["model"] >= 0
