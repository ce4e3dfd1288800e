"""Cluster of several nodes on this machine by `ray start`, with a separate loopback address per node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.support.ports import free_ports

BIN = Path(sys.executable).parent
MEMORY = str(200 * 2**20)


class Nodes:
    """The head at 127.0.0.2 runs no work; workers are at 127.0.0.3 and following addresses."""

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        self.environment = (
            os.environ
            | {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_BACKEND_LOG_LEVEL": "fatal",
                "RAY_worker_niceness": "0",
                "RAY_ADDRESS": "",
            }
            | environment
        )
        self._folder = folder
        self._log = Path(folder, "log")
        self._processes: list[subprocess.Popen[bytes]] = []
        gcs, dashboard, clients = free_ports(3)
        self.address, self.url = f"127.0.0.2:{gcs}", f"http://127.0.0.2:{dashboard}"
        self._start(
            "--head", f"--port={gcs}", "--num-cpus=0", f"--temp-dir={folder}/ray",
            "--dashboard-host=127.0.0.2", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={clients}",
        )  # fmt: skip

    def wait_for_head(self) -> None:
        self._wait(lambda: httpx.get(f"{self.url}/api/version").status_code in (200, 401), "the head")

    def wait_for_all(self) -> None:
        """Wait until every started node has joined."""
        self._wait(
            lambda: self._log.read_text().count("Ray runtime started.") >= len(self._processes), "a node"
        )

    def add(self, cpus: int = 4, **environment: str) -> subprocess.Popen[bytes]:
        """Start another node; end it with `end`."""
        # In a shared folder, each node would remove and write the working directory of a running job.
        own = f"--temp-dir={self._folder}/ray{len(self._processes)}"
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}", own, **environment)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node with all its processes, like a lost machine."""
        if process.poll() is None:
            node = psutil.Process(process.pid)
            for each in [node, *node.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()

    def close(self) -> None:
        for process in reversed(self._processes):
            self.end(process)

    def _start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        number = len(self._processes) + 2
        metrics, agent, grpc, environments = free_ports(4)
        command = [
            str(BIN / "ray"), "start", "--block", f"--node-ip-address=127.0.0.{number}",
            f"--object-store-memory={MEMORY}", f"--metrics-export-port={metrics}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
            f"--runtime-env-agent-port={environments}", "--min-worker-port=0", "--max-worker-port=0",
            *arguments,
        ]  # fmt: skip
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment | environment, start_new_session=True
            )
        self._processes.append(process)
        return process

    def _wait(self, is_so, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if is_so():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"{what} did not start\n{self._log.read_text()}")


@contextmanager
def nodes(workers: int = 1, cpus: int = 4, **environment: str) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(
        prefix="n", ignore_cleanup_errors=True
    ) as folder:  # short: sockets below
        cluster = Nodes(folder, environment)
        try:
            cluster.wait_for_head()
            for _ in range(workers):
                cluster.add(cpus)
            cluster.wait_for_all()
            yield cluster
        finally:
            cluster.close()
