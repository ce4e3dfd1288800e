"""The driver, a model or a node of `scalp grade` is killed: no photograph is lost, none is counted twice."""

import os
import signal
import uuid

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.support.grading import MARK, PHOTOGRAPHS, SHARD, check, processes, put_photographs, start

NODE = {"num_cpus": 3, "object_store_memory": 200 * 2**20}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    put_photographs(str(folder))
    return str(folder)


@pytest.fixture
def mark(monkeypatch):
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    return value


def test_a_killed_driver_costs_at_most_the_shard_of_each_model(bundle, s3, tmp_path, mark):
    source, out = f"s3://scalp/{tmp_path.name}/photographs", f"s3://scalp/{tmp_path.name}/out"
    put_photographs(source)
    run = start(bundle, source, out, tmp_path / "log")
    run.wait_for(3)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    again = start(bundle, source, out, tmp_path / "log")
    printed = again.end()
    summary = check(again, graded_again=2 * SHARD)  # two models on two cores
    assert "resuming: " in printed
    _, second = summary["sessions"]
    assert 0 < second["photographs"] < PHOTOGRAPHS
    # A third time there is nothing to do.
    finished = start(bundle, source, out, tmp_path / "third")
    assert f"all {PHOTOGRAPHS:,} images are accounted for" in finished.end()


def test_a_killed_model_is_started_again_by_itself(bundle, photographs, tmp_path, mark):
    run = start(bundle, photographs, str(tmp_path / "out"), tmp_path / "log")
    run.wait_for(3)
    model, *_ = processes(mark, "ray::GradeShard")
    os.kill(model, signal.SIGKILL)
    run.end()
    check(run, graded_again=SHARD)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_lost_node_costs_at_most_the_shard_of_each_model(bundle, photographs, tmp_path, mark):
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        lost = cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        run = start(bundle, photographs, str(tmp_path / "out"), tmp_path / "log", RAY_ADDRESS=cluster.address)
        run.wait_for(8)
        assert len(processes(mark, "ray::GradeShard")) == 2
        cluster.remove_node(lost, allow_graceful=False)
        run.end()
    finally:
        cluster.shutdown()
    summary = check(run, graded_again=2 * SHARD)
    assert summary["settings"]["models"] == [2, 2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_node_of_the_only_model_is_lost(bundle, photographs, tmp_path, mark):
    """Loading tasks that wait for the model leave a CPU of the other node to the next one."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(**NODE) for _ in range(2)]
        cluster.wait_for_nodes()
        options = ["--cluster", "--replicas", "1", "--loaders", "6"]
        out, log = str(tmp_path / "out"), tmp_path / "log"
        run = start(bundle, photographs, out, log, options=options, RAY_ADDRESS=cluster.address)
        run.wait_for(3)
        (model,) = processes(mark, "ray::GradeShard")
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
        cluster.remove_node(raylets[psutil.Process(model).ppid()], allow_graceful=False)
        run.end()
    finally:
        cluster.shutdown()
    check(run, graded_again=SHARD)


@pytest.mark.slow
def test_a_cluster_of_two_cpus_is_enough(bundle, photographs, tmp_path, mark):
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 2, "include_dashboard": False})
    try:
        run = start(bundle, photographs, str(tmp_path / "out"), tmp_path / "log", RAY_ADDRESS=cluster.address)
        run.end()
        check(run, graded_again=0)
        again = start(bundle, photographs, run.out, tmp_path / "again", RAY_ADDRESS=cluster.address)
        assert "is finished" in again.end()
    finally:
        cluster.shutdown()
