"""Start `scalp grade` in a separate process to disturb it, and check its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scalp_core import storage
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import outputs
from tests.support.images import jpeg
from tests.support.result_rows import read_results

MARK = "SCALP_TEST_RUN"  # environment variable that identifies the processes of a run
SHARD = 16
PHOTOGRAPHS = 1000


class Run(NamedTuple):
    process: subprocess.Popen
    out: str
    log: Path

    def wait(self, until: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def committed(self) -> int:
        """Number of graded shards."""
        graded = storage.join(self.out, outputs.SCRATCH_FOLDER, "graded")
        groups = storage.folders_in(graded)
        return sum(len(storage.names_in(storage.join(graded, group))) for group in groups)

    def wait_for(self, shards: int) -> None:
        """Wait until `shards` shards are committed, but not most of them."""
        self.wait(lambda: self.committed() >= shards)
        assert self.committed() < PHOTOGRAPHS // SHARD - 2, "too late to disturb anything"

    def end(self, code: int = 0) -> str:
        """Wait for the end of the run; return its output."""
        self.process.wait(timeout=200)
        printed = self.log.read_text()
        assert self.process.returncode == code, printed
        return printed


def put_photographs(folder: str) -> None:
    """Write the images of a run, locally or to S3."""

    def put(index: int) -> None:
        storage.write(f"{folder}/{index % 4}/{index:05d}.jpg", pool_of[index % len(pool_of)])

    pool_of = [jpeg(seed, size=(160, 120)) for seed in range(50)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(PHOTOGRAPHS)))


def start(
    bundle: Path,
    source: str,
    out: str,
    log: Path,
    shard: int = SHARD,
    options: Sequence[str] = ("--cluster",),
    **environment: str,
) -> Run:
    command = [sys.executable, "-m", "jobs.cli", "grade", str(bundle), source, out, "--device", "cpu"]
    with log.open("a") as output:
        process = subprocess.Popen(
            [*command, *options, "--shard-size", str(shard), "--heatmaps", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
    return Run(process, out, log)


def check(run: Run, graded_again: int) -> dict[str, Any]:
    """Check that each image has one row; at most `graded_again` were committed twice. Return the summary."""
    summary = json.loads(storage.read(storage.join(run.out, "summary.json")))
    ids = read_results(storage.join(run.out, RESULTS_FOLDER))["location_id"].to_pylist()
    assert len(ids) == len(set(ids)) == PHOTOGRAPHS
    assert (summary["rows"], summary["graded"], summary["rows_unaccounted"]) == (PHOTOGRAPHS, PHOTOGRAPHS, 0)
    assert sum(session["photographs"] for session in summary["sessions"]) <= PHOTOGRAPHS + graded_again
    return summary


def processes(mark: str, title: str) -> list[int]:
    """Ids of the processes of one run whose title begins with `title`."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            named = (folder / "cmdline").read_bytes().startswith(title.encode())
            if named and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
        except OSError:  # ended, or not a process
            continue
    return pids
