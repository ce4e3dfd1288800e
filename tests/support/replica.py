"""A replica of the endpoint without Ray: the same application and grader, served by uvicorn.

`python -m tests.support.replica BUNDLE SETTINGS FD` serves one at an inherited socket until it is killed.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from serving.api.routes import create_api
from serving.replicas.combined import CombinedGrader
from serving.replicas.ingress import replica
from serving.settings import Settings


async def serve(
    bundle: Path, settings: Settings, listener: socket.socket, servers: list[uvicorn.Server]
) -> None:
    """Serve the application of a replica as Ray Serve does, over a grader in this process."""
    grader = CombinedGrader(settings, create_api)
    await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})

    async def this_replica() -> CombinedGrader:  # a function that is not async would run in a thread
        return grader

    api = grader.__serve_build_asgi_app__()
    api.dependency_overrides[replica] = this_replica
    # Ray's replicas run in uvloop, which sets it. Without it, answers of an open connection wait 40 ms for
    # the client's delayed acknowledgment.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    servers.append(uvicorn.Server(uvicorn.Config(api, log_level="error")))
    await servers[0].serve([listener])


@contextmanager
def replica_process(
    bundle: Path, settings: Settings, folder: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a replica in a process, which is killed at the end."""
    file = folder / "settings.json"
    file.write_text(settings.model_dump_json(exclude_unset=True))
    with socket.create_server(("127.0.0.1", port)) as listener:
        command = [sys.executable, "-m", __name__, str(bundle), str(file), str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    with process:
        try:
            # The socket takes the connection at once; the answer comes when the model is loaded.
            httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=200).raise_for_status()
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    given = Settings.model_validate_json(Path(sys.argv[2]).read_text())
    asyncio.run(serve(Path(sys.argv[1]), given, socket.socket(fileno=int(sys.argv[3])), []))
