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
_PROVIDER, _HEAD_ID, _HEAD_TYPE = ray_internals.simulated_provider()


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
        simulated = ray_internals.simulated_environment(_HEAD_ID)
        with Path(folder, "log").open("wb") as log:
            head = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0",
                 f"--port={port}", f"--object-store-memory={_OBJECT_STORE}", f"--temp-dir={folder}/ray",
                 "--include-dashboard=false", f"--autoscaling-config={config}"],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | simulated | (environment or {}),
            )  # fmt: skip
        try:
            _wait(address, head, Path(folder, "log"))
            yield address
        finally:
            _end(head.pid)
            head.wait()


def working_nodes(address: str) -> int:
    """Number of living nodes without the head."""
    return ray_internals.living_nodes(address, _NODE)


def _config(address: str, node: dict[str, float], most: int, idle_seconds: float) -> dict[str, object]:
    return (
        {
            "cluster_name": "simulated",
            "max_workers": most,
            "idle_timeout_minutes": idle_seconds / 60,
            "provider": {
                # By its class name: the provider type reads a file of defaults that the wheel lacks.
                "type": "external",
                "module": _PROVIDER,
                "gcs_address": address,
                "head_node_id": _HEAD_ID,
                "launch_multiple": True,
            },
            "available_node_types": {
                _HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                _NODE: {
                    "resources": node | {"object_store_memory": _OBJECT_STORE},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                },
            },
            "head_node_type": _HEAD_TYPE,
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
