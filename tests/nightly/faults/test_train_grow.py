"""A node joins a training and goes again: the run grows and shrinks by itself, and its curve is the same."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.nightly.faults.test_train_lost import MARK, NODE, check_curve, start, training_workers

pytestmark = pytest.mark.slow

# By then Ray has noticed a node that joined: it looks every 20 s.
NOTICED_S = 22


def _node_of(process: int, cluster: Cluster):
    """The node that a worker runs on: its parent is the node's raylet."""
    parent = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{process}/status").read_text()).group(1))
    for node in cluster.worker_nodes:
        if any(parent == info.process.pid for info in node.all_processes["raylet"]):
            return node
    raise AssertionError(f"no node has a process {parent}")


def _runs_of(numbers: Iterable[int]) -> list[int]:
    """Without repeats that follow each other."""
    return [number for number, _ in itertools.groupby(numbers)]


@pytest.mark.timeout(600)
def test_a_run_grows_with_a_node_that_joins_and_shrinks_without_one(
    pipeline, train_single_worker, tmp_path, monkeypatch
):
    alone = train_single_worker(10, "convnext_atto")  # long enough for a node to come and another to go
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    head = {"num_cpus": 0, "include_dashboard": False, **NODE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        # Three CPUs are one worker and two for its data, though --workers asks for up to two.
        cluster.add_node(num_cpus=3, **NODE)
        cluster.wait_for_nodes()
        # These epochs are shorter than Ray's two seconds between looks at its workers.
        looks = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        run = start(pipeline, tmp_path / "run", alone.settings, "1:2", RAY_ADDRESS=cluster.address, **looks)
        run.wait(run.kept)
        before = run.kept()
        # Held until Ray has noticed the node: all epochs would be over by then.
        (only,) = training_workers(mark)
        os.kill(only, signal.SIGSTOP)
        cluster.add_node(num_cpus=3, **NODE)
        time.sleep(NOTICED_S)
        os.kill(only, signal.SIGCONT)
        run.wait(lambda: run.kept()[-1:] and run.kept()[-1]["workers"] == 2)
        kept = run.kept()
        cluster.remove_node(_node_of(training_workers(mark)[0], cluster), allow_graceful=False)
        summary = run.end()
    finally:
        cluster.shutdown()
    # Two may start once more, on the node that is left, before Ray has declared the other dead.
    assert _runs_of(workers for _, workers in run.starts()) == [1, 2, 1]
    # At most the epoch that was running is done again, each time.
    assert len(before) <= run.starts()[1][0]
    assert all(len(kept) <= epoch for epoch, _ in run.starts()[2:])
    check_curve(summary, kept, alone.trained)
    assert _runs_of(entry["workers"] for entry in summary["history"]) == [1, 2, 1]
