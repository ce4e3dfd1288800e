"""A worker or a node that is lost in the middle of an epoch: the run ends by itself, where it would have."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.faults.test_train_stopped import committed_history

MARK = "SCALP_TEST_RUN"  # in the environment of every process of a run, to find them by


def start(way, run: Path, **environment: str) -> subprocess.Popen:
    # As the run of the fixture `way`, which nothing disturbed.
    settings = ["--set", f"size={way.recipe.size}", "--set", f"epochs={way.recipe.epochs}"]
    command = [sys.executable, "-m", "jobs.cli", "train", str(way.data), str(run), "--recipe", "smoke"]
    return subprocess.Popen(
        [*command, *settings, "--workers", "2", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )


def after_the_first_epoch(run: Path, process: subprocess.Popen) -> list[dict]:
    """Waits until the first epoch is kept; the epochs kept."""
    deadline = time.monotonic() + 200
    while not (kept := committed_history(run)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return kept


def training_workers(mark: str) -> list[int]:
    """Process ids of the training workers of one run."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            named = b"RayTrainWorker" in (folder / "cmdline").read_bytes()
            if named and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):  # not a process, or gone
            continue
    return found


def check_end(process: subprocess.Popen, run: Path, kept: list[dict], undisturbed: dict) -> None:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    going_on = [line for line in output.splitlines() if "going on after epoch" in line]
    assert going_on, output
    # At most the epoch that was running is done again.
    assert int(going_on[0].rsplit(" ", 1)[1]) >= len(kept)
    summary = json.loads((run / "summary.json").read_text())
    assert [entry["epoch"] for entry in summary["history"]] == [1, 2, 3, 4]
    assert summary["history"][: len(kept)] == kept
    assert summary["validation"]["qwk"] == pytest.approx(undisturbed["validation"]["qwk"], abs=0.02)
    # Not only where it ends: the curve is the one that it would have had.
    for entry, other in zip(summary["history"], undisturbed["history"], strict=True):
        assert entry["step_losses"] == pytest.approx(other["step_losses"], rel=0.05)


@pytest.mark.timeout(600)
def test_a_killed_worker_costs_at_most_one_epoch(way, tmp_path):
    mark = uuid.uuid4().hex
    process = start(way, tmp_path / "run", **{MARK: mark})
    kept = after_the_first_epoch(tmp_path / "run", process)
    workers = training_workers(mark)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    check_end(process, tmp_path / "run", kept, way.trained)


HOLD = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=4, resources={"head": 1})
class Hold:
    def ready(self): return True
hold = Hold.remote()
ray.get(hold.ready.remote())
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(600)
def test_a_killed_node_costs_at_most_one_epoch(way, tmp_path, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)  # the nodes' processes inherit it
    node = {"object_store_memory": 200 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, "resources": {"head": 1}, **node})
    holder = None
    try:
        lost = cluster.add_node(num_cpus=4, object_store_memory=200 * 2**20)
        cluster.wait_for_nodes()
        # The head is busy, so that the workers start on the node that will be lost.
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, cluster.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        process = start(way, tmp_path / "run", RAY_ADDRESS=cluster.address)
        while len(training_workers(mark)) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        holder.communicate("\n", timeout=60)
        kept = after_the_first_epoch(tmp_path / "run", process)
        cluster.remove_node(lost, allow_graceful=False)
        check_end(process, tmp_path / "run", kept, way.trained)
    finally:
        if holder and holder.poll() is None:
            holder.kill()
        cluster.shutdown()
