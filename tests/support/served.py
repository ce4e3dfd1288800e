"""Run `scalp serve` in a process, with HAProxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cluster.haproxy import SECONDS_VARIABLE
from serving.schemas.bulk import BulkSettings
from serving.settings import Settings
from tests.support import processes, sockets
from tests.support.ports import free_port
from tests.support.sizes import CONNECTION_SECONDS

# Settings of the endpoint that tests share; the same arithmetic on every machine, whether or not it has bf16.
PRECISION = "fp32"
BULK_SOURCES, BULK_OUT = "s3://scalp/bulk/in", "s3://scalp/bulk/out"
SHARED = Settings(device="cpu", precision=PRECISION, bulk=BulkSettings(sources=(BULK_SOURCES,), out=BULK_OUT))


class Served(NamedTuple):
    """Ports where HAProxy listens for HTTP and gRPC, and id of the process of `scalp serve`."""

    port: int
    pid: int
    grpc_port: int | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replicas(self) -> list[tuple[str, int]]:
        """Names and ids of the replicas, such as `ray::ServeReplica:scalp:Grader`."""
        named = [(processes.name(pid), pid) for pid in processes.tree(self.pid)]
        return [(name, pid) for name, pid in named if name.startswith("ray::ServeReplica")]

    def kill(self) -> None:
        """End all processes of the endpoint as a power cut would."""
        for pid in processes.tree(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def scalp_serve(
    bundle: Path,
    settings: Settings,
    folder: Path,
    port: int | None = None,
    grpc: bool = False,
    killed: bool = False,
) -> Iterator[Served]:
    """Run `scalp serve` on a Ray that it starts itself.

    Args:
        bundle: Directory of the bundle.
        settings: Settings of the endpoint.
        folder: Directory for the settings file.
        port: Port of the endpoint; None takes a free one.
        grpc: Serve gRPC too, on a free port.
        killed: Kill it at the end; its ordinary end, as by Ctrl-C, takes up to 15 s.
    """
    file, port = folder / "settings.yaml", port or free_port()
    file.write_text(settings.model_dump_json(exclude_unset=True))
    command = [sys.executable, "-m", "jobs.cli", "serve", str(bundle), "--port", str(port)]
    command += ["--settings", str(file)]
    grpc_port = free_port() if grpc else None
    command += ["--grpc-port", str(grpc_port)] if grpc_port else []
    environment = os.environ | {"RAY_ADDRESS": "", SECONDS_VARIABLE: str(CONNECTION_SECONDS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        served = Served(port, server.pid, grpc_port)
        try:
            assert server.stdout.readline().startswith("READY")
            assert sockets.await_listener(port, server.pid) == "haproxy"
            yield served
        finally:
            served.kill() if killed else server.terminate()
