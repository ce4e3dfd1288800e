"""Simulated cluster on this machine with an autoscaler: Ray's fake cloud provider."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.core.generated.autoscaler_pb2 import NodeStatus

from cluster import ray_internals
from cluster.local import require_token

_READY_S = 60
_END_S = 10
# Required by the schema; a simulated node runs no commands.
_NO_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip
_NODE = "worker"
_OBJECT_STORE = 200 * 2**20
# Environment variables of the head.
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "RAY_USAGE_STATS_ENABLED": "0",
    ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # listens on loopback, as a local Ray does
    "RAY_ADDRESS": "",
}


@contextmanager
def simulated_cluster(
    node: dict[str, float], most: int, idle_seconds: float, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Run a head node without CPUs, and an autoscaler that adds nodes under load and removes idle ones.

    Args:
        node: Resources of each node, by Ray's names.
        most: Maximum number of nodes.
        idle_seconds: Seconds until an idle node is removed.
        environment: Environment variables of the cluster, in addition to those of this process.

    Returns:
        Address for RAY_ADDRESS.

    Raises:
        ClusterError: The environment turns off the token.
        RuntimeError: The cluster does not start.
    """
    require_token()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="s", ignore_cleanup_errors=True) as folder:
        config = Path(folder, "cluster.json")
        config.write_text(json.dumps(_config(address, node, most, idle_seconds)))
        with Path(folder, "log").open("wb") as log:
            head = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
                 f"--port={port}", f"--object-store-memory={_OBJECT_STORE}", f"--temp-dir={folder}/ray",
                 "--include-dashboard=false", f"--autoscaling-config={config}"],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | (environment or {}),
            )  # fmt: skip
        try:
            _wait(address, head, Path(folder, "log"))
            yield address
        finally:
            _end(head.pid)
            head.wait()


def working_nodes(address: str) -> int:
    """Number of living nodes without the head."""
    nodes = ray_internals.cluster_status(address).cluster_resource_state.node_states
    return sum(node.status != NodeStatus.DEAD and node.ray_node_type_name == _NODE for node in nodes)


def _config(address: str, node: dict[str, float], most: int, idle_seconds: float) -> dict[str, object]:
    return (
        {
            "cluster_name": "simulated",
            "max_workers": most,
            "idle_timeout_minutes": idle_seconds / 60,
            "provider": {
                # By its class name: the provider type reads a file of defaults that the wheel lacks.
                "type": "external",
                "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
                "gcs_address": address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "available_node_types": {
                FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                _NODE: {
                    "resources": node | {"object_store_memory": _OBJECT_STORE},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                },
            },
            "head_node_type": FAKE_HEAD_NODE_TYPE,
        }
        | {name: [] for name in _NO_COMMANDS}
        | {name: {} for name in ("auth", "docker", "file_mounts")}
    )


def _wait(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _READY_S
    host, port = address.split(":")
    while head.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            continue
        if ray_internals.autoscaling_state(address).autoscaler_state_version:
            return
    raise RuntimeError(f"the simulated cluster does not start: {log.read_text(errors='replace')[-2000:]}")


def _end(pid: int) -> None:
    """End the head node and the nodes that its autoscaler started."""
    head = psutil.Process(pid)
    processes = [*head.children(recursive=True), head]
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=_END_S)
    for process in alive:
        process.kill()
