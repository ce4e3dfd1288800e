"""A worker or a node is lost: the run goes on by itself, and its curve is the same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from ray.cluster_utils import Cluster

from tests.nightly.faults.test_train_stopped import committed_history

MARK = "SCALP_TEST_RUN"  # in the environment of every process of a cluster, to find them by
NODE = {"object_store_memory": 200 * 2**20}
# The verb as a user starts it, but for how often it considers the nodes.
VERB = """
from jobs.cli import main as cli
from jobs.train import scaling
scaling.SECONDS_BETWEEN_RESIZES = 1.0
cli.main()
"""


class Run(NamedTuple):
    """A training in a process of its own."""

    process: subprocess.Popen
    folder: Path
    log: Path

    def wait(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + 200
        while not until():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kept(self) -> list[dict]:
        return committed_history(self.folder)

    def starts(self) -> list[tuple[int, int]]:
        """The epochs kept and the workers, each time that they started."""
        found = re.findall(r"(?:starting|resuming after epoch (\d+)), workers: (\d+)", self.log.read_text())
        return [(int(epoch or 0), int(workers)) for epoch, workers in found]

    def end(self) -> dict:
        self.process.wait(timeout=280)
        assert self.process.returncode == 0, self.log.read_text()
        return json.loads((self.folder / "summary.json").read_text())


def start(pipeline, folder: Path, settings: list[str], workers: str, **environment: str) -> Run:
    log = folder.with_suffix(".log")
    changes = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable,
        "-c",
        VERB,
        "train",
        str(pipeline.data),
        str(folder),
        "--recipe",
        "smoke",
        *changes,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--workers", workers, "--device", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | environment,
        )
    return Run(process, folder, log)


def training_workers(mark: str) -> list[int]:
    """Process ids of the training workers of one cluster."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            named = b"RayTrainWorker" in (folder / "cmdline").read_bytes()
            if named and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):  # not a process, or gone
            continue
    return found


def check_curve(summary: dict, kept: list[dict], undisturbed: dict) -> None:
    """Every epoch once, and each with the losses that it would have had."""
    history, others = summary["history"], undisturbed["history"]
    assert [entry["epoch"] for entry in history] == [other["epoch"] for other in others]
    assert history[: len(kept)] == kept
    for entry, other in zip(history, others, strict=True):
        assert entry["step_losses"] == pytest.approx(other["step_losses"], rel=0.05)


HOLD = """
import os, ray, sys
from cluster.local import connect
os.environ["RAY_ADDRESS"] = sys.argv[1]
connect()
@ray.remote(num_cpus=4, resources={"head": 1})
class Hold:
    def ready(self): return True
hold = Hold.remote()
ray.get(hold.ready.remote())
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(600)
def test_a_killed_worker_and_a_killed_node_cost_at_most_one_epoch_each(pipeline, tmp_path, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)  # the nodes' processes inherit it
    head = {"num_cpus": 5, "resources": {"head": 1}, "include_dashboard": False, **NODE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    holder = None
    try:
        lost = cluster.add_node(num_cpus=4, **NODE)
        cluster.wait_for_nodes()
        # The head is busy, so that photographs and workers start on the node that will be lost.
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, cluster.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        # As the run of the fixture `pipeline`, which nothing disturbed.
        settings = [f"size={pipeline.recipe.size}", f"epochs={pipeline.recipe.epochs}"]
        run = start(pipeline, tmp_path / "run", settings, "2", RAY_ADDRESS=cluster.address)
        run.wait(run.kept)
        kept = run.kept()
        workers = training_workers(mark)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        run.wait(lambda: len(run.starts()) == 2)
        holder.communicate("\n", timeout=60)
        cluster.remove_node(lost, allow_graceful=False)
        summary = run.end()
    finally:
        if holder and holder.poll() is None:
            holder.kill()
        cluster.shutdown()
    # At most the epoch that was running is done again, each time.
    assert [workers for _, workers in run.starts()] == [2, 2, 2]
    assert len(kept) <= run.starts()[1][0] <= run.starts()[2][0]
    check_curve(summary, kept, pipeline.trained)
    assert summary["validation"]["qwk"] == pytest.approx(pipeline.trained["validation"]["qwk"], abs=0.02)
