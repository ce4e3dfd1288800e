"""`scalp prepare` and `--retry-failed`, killed before and after each step that changes storage, then resumed.

Each time: exactly one row per image.
"""

import json
import signal
from itertools import islice

import pytest

from scalp_core import storage
from scalp_core.curation import queries
from scalp_core.datasets import manifest
from scalp_core.storage import lease, listing, outputs, parquet
from tests.support import crashes, preparing

LEAST_POINTS = {"local": 90, "s3": 44}
LEAST_POINTS_OF_A_RETRY = {"local": 70, "s3": 30}
WHERE = pytest.mark.parametrize(
    ("where", "every"),
    [
        ("local", 9),
        pytest.param("local", 1, marks=pytest.mark.slow),
        pytest.param("s3", 1, marks=pytest.mark.slow),
    ],
)


@pytest.fixture
def root(where, tmp_path, s3):
    """A local folder, or a prefix of a real S3 server."""
    return str(tmp_path) if where == "local" else f"s3://scalp/crashes/{tmp_path.name}"


def contents(uri):
    return {file.uri: (file.size, file.version) for file in storage.walk(uri)}


def check(source, out, before, unfetched=0):
    summary = json.loads(storage.read(f"{out}/summary.json"))
    kept, left_out = preparing.KEPT - unfetched, preparing.DROPPED + unfetched
    rows = manifest.read_manifest(out)
    dropped = parquet.read(f"{out}/{queries.DROPPED_FILE}").to_pylist()
    names = [(row["uri"], row["member"]) for row in [*rows.to_pylist(), *dropped]]
    assert rows.num_rows == summary["photographs"] == kept
    # Of the tar's two members of one name, the first is dropped under the name that the last is kept by.
    assert len(dropped) == sum(summary["dropped"].values()) == left_out
    assert summary["could_not_be_fetched"] == unfetched
    assert len(set(names)) == len(names) - 1
    images = preparing.KEPT + preparing.DROPPED
    assert summary["objects"] == {"photograph": images, "other": 1}
    assert summary["objects_listed"] == images + 1
    left = [file.uri for file in storage.walk(out)]
    assert outputs.has_scratch(out) == bool(unfetched)  # what a retry needs
    left = [uri for uri in left if outputs.SCRATCH_FOLDER not in uri]
    # The next run that opens OUT removes those of a lease that was being released: nobody reads them.
    left = [uri for uri in left if f"/{lease.FOLDER}/" not in uri]
    assert not [uri for uri in left if listing.TEMPORARY.match(uri.rsplit("/", 1)[-1])]
    assert contents(source) == before


@pytest.mark.timeout(1800)
@WHERE
def test_a_run_that_is_killed_at_any_step_is_resumed_to_one_row_per_image(where, every, root):
    source = f"{root}/source"
    preparing.write_source(source)
    before = contents(source)
    tried = 0
    for point in islice(crashes.points(), 0, None, every):
        out = f"{root}/out-{point.step}-{point.after}"
        killed = crashes.killed_at(point, preparing.prepare_in_process, source, out)
        if killed:
            tried += 1
            crashes.run(preparing.prepare_in_process, source, out)
        check(source, out, before)
        if not killed:
            break
    print(f"{where}: {tried} points tried")
    assert tried >= LEAST_POINTS[where] // every


@pytest.mark.timeout(1800)
@WHERE
def test_a_retry_that_is_killed_at_any_step_is_resumed_to_one_row_per_image(where, every, root):
    source, finished = f"{root}/source", f"{root}/finished"
    preparing.write_source(source)
    before = contents(source)
    crashes.run(preparing.prepare_in_an_outage, source, finished)
    check(source, finished, before, unfetched=len(preparing.UNFETCHED))
    tried = 0
    for number, point in enumerate(islice(crashes.points(), 0, None, every)):
        out = f"{root}/out-{point.step}-{point.after}"
        for file in storage.walk(finished):
            storage.write(out + file.uri.removeprefix(finished), storage.read(file.uri))
        killed = crashes.killed_at(point, preparing.prepare_in_process, source, out, True)
        if killed:
            tried += 1
            if number % 2:  # without --retry-failed, what was not read again yet stays out
                crashes.run(preparing.prepare_in_process, source, out)
                unfetched = json.loads(storage.read(f"{out}/summary.json"))["could_not_be_fetched"]
                check(source, out, before, unfetched)
            crashes.run(preparing.prepare_in_process, source, out, True)
        check(source, out, before)
        if not killed:
            break
    print(f"{where}: {tried} points tried")
    assert tried >= LEAST_POINTS_OF_A_RETRY[where] // every


def test_an_image_that_ends_the_process_is_one_row_after_three_tries(tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    preparing.write_source(source)
    for _ in range(3):
        with pytest.raises(AssertionError, match=f"ended with -{signal.SIGSEGV.value}"):
            crashes.run(preparing.prepare_with_a_deadly_image, source, out)
    crashes.run(preparing.prepare_with_a_deadly_image, source, out)
    dropped = parquet.read(f"{out}/{queries.DROPPED_FILE}").to_pylist()
    (crashed,) = [row for row in dropped if row["reason"] == "crashed"]
    assert crashed["uri"] == f"{source}/{preparing.KILLER % 4}/{preparing.KILLER}.jpg"
    assert manifest.read_manifest(out).num_rows == preparing.KEPT - 1
