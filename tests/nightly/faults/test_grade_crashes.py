"""`scalp grade` and `--retry-failed`, killed before or after each step that changes storage, then resumed.

Each time: exactly one row per image, a summary that says so, untouched sources, and nothing left over.
"""

import itertools
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from jobs.common.console import read_json
from scalp_core import storage
from scalp_core.storage import outputs
from tests.support import crashes
from tests.support.small_grade import IMAGES, NEWER, picture, rows, run, sources, write_bundle

AT_ONCE = 2
# What is stored after a step is what is stored before the next one, so an ordinary run tries one side.
BOTH_SIDES = pytest.mark.parametrize(
    "after", [pytest.param(False, id="before"), pytest.param(True, id="after", marks=pytest.mark.slow)]
)


@pytest.fixture(params=["disk", "s3"])
def root(request, s3):
    """A local folder in memory, where flushing costs nothing, or a prefix of a real S3 server."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if request.param == "disk":
            yield folder
        else:
            yield f"s3://scalp/{Path(folder).name}"


@pytest.fixture
def job(root, tmp_path):
    """Bundle and sources."""
    return write_bundle(str(tmp_path / "bundle")), sources(f"{root}/data")


def contents(uri):
    return {file: sha256(storage.read(file)).hexdigest() for file in storage.list_files(uri)}


@BOTH_SIDES
def test_one_row_per_image_wherever_a_run_is_killed(job, root, after):
    before = contents(f"{root}/data")

    def trial(number, point):
        out = f"{root}/out-{number}"
        killed = crashes.killed_at(point, run, *job, out, False, False)
        crashes.run(run, *job, out, False, False)
        check(out, failed=1)
        return killed

    tried = exhaust(trial, after)
    assert contents(f"{root}/data") == before
    assert tried >= (23 if storage.is_s3(root) else 48)


@BOTH_SIDES
def test_one_row_per_image_wherever_a_retry_is_killed(job, root, after):
    finished = f"{root}/finished"
    crashes.run(run, *job, finished, False, False)
    kept = {row["location_id"]: row for row in rows(finished) if row["status"] == "graded"}
    storage.write(f"{root}/data/source/bad.jpg", picture(10))

    def trial(number, point):
        out = f"{root}/out-{number}"
        copy(finished, out)
        killed = crashes.killed_at(point, run, *job, out, True, False)
        unasked = number % 2 == 0  # without --retry-failed a retry that began ends, and none begins
        crashes.run(run, *job, out, not unasked, False)
        began = bool(read_json(f"{out}/summary.json")["retries"])
        check(out, failed=0 if began else 1)
        assert began or unasked
        assert kept.items() <= {row["location_id"]: row for row in rows(out)}.items()
        return killed

    tried = exhaust(trial, after)
    assert tried >= (15 if storage.is_s3(root) else 30)


def exhaust(trial, after) -> int:
    """Tries all points on one side of a step until one is past the job's end; how many killed it."""
    points, tried = enumerate(point for point in crashes.points() if point.after == after), 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while True:
            chunk = list(itertools.islice(points, 2 * AT_ONCE))
            killed = list(pool.map(lambda pair: trial(*pair), chunk))
            tried += sum(killed)
            if not all(killed):
                print(f"{tried} points")
                return tried


def check(out, failed):
    summary = read_json(f"{out}/summary.json")
    assert (summary["rows"], summary["rows_unaccounted"]) == (IMAGES, 0)
    assert (summary["failed"], summary["by_error"]) == (failed, {"empty": 1} if failed else {})
    counted = ("repeated", "shadowed_members", "other_files")
    assert [summary[name] for name in counted] == [1, 1, 1]
    found = rows(out)
    names = sorted((row["member"] or row["uri"]).rsplit("/", 1)[-1] for row in found)
    assert names == [f"{name}.jpg" for name in ("a", "b", "bad", "t1", "t2", "t3", "x", "y", "z1", "z2")]
    (twice,) = (row for row in found if row["member"] == "t1.jpg")
    assert twice["sha256"] == sha256(NEWER).hexdigest()
    # A temporary file of a lease stays: it lies where another run may write its own.
    left = {uri.removeprefix(f"{out}/") for uri in storage.list_files(out)}
    left = {name for name in left if not name.startswith((".scalp-lease/", "results/part-"))}
    assert left == {"report.html", "run.json", "scalp.json", "summary.json"}
    assert not outputs.has_scratch(out)


def copy(source, target):
    if not storage.is_s3(source):
        shutil.copytree(source, target)
        return
    for uri in storage.list_files(source):
        storage.write(target + uri.removeprefix(source), storage.read(uri))
