"""Run `scalp serve` in a process, with HAProxy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.http import connections
from serving.settings import Settings
from tests.support import sockets
from tests.support.ports import free_port
from tests.support.sizes import CONNECTION_SECONDS


@contextmanager
def scalp_serve(bundle: Path, settings: Settings, folder: Path) -> Iterator[int]:
    """Run `scalp serve` on a Ray that it starts itself; yield the port, where HAProxy listens.

    Args:
        bundle: Directory of the bundle.
        settings: Settings of the endpoint.
        folder: Directory for the settings file.
    """
    file, port = folder / "settings.yaml", free_port()
    file.write_text(settings.model_dump_json(exclude_unset=True))
    command = [sys.executable, "-m", "jobs.cli", "serve", str(bundle), "--port", str(port)]
    command += ["--settings", str(file)]
    environment = os.environ | {"RAY_ADDRESS": "", connections.VARIABLE: str(CONNECTION_SECONDS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout.readline().startswith("READY")
            (listener,) = {each.process for each in sockets.listening(server.pid) if each.port == port}
            assert listener == "haproxy"
            yield port
        finally:
            server.terminate()
