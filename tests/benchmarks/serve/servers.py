"""Start and stop servers under test; freeze a server while others are measured."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx
from filelock import FileLock, Timeout

from jobs.bench.load import PATH
from tests.support import processes

_READY_S = 120
_END_S = 30


class Server:
    """Server process on a free port, as a context manager.

    Args:
        what: Name of the server.
        command: Arguments of Python; `PORT` is replaced by the port.
        image: JPEG file to send until the server is ready.
        environment: Environment variables, in addition to those of this process.
        key: API key to send.
    """

    def __init__(
        self,
        what: str,
        command: list[str],
        image: bytes,
        environment: Mapping[str, str],
        key: str | None = None,
    ) -> None:
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.what, self._image, self._environment = what, image, environment
        self.port, self._claim = _claim_port()
        self._command = [word.replace("PORT", str(self.port)) for word in command]

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        # A separate Ray.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._output: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, *self._command],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment | dict(self._environment),
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def processes(self, name: str) -> list[int]:
        """Process ids of the server with this name."""
        return [pid for pid in processes.tree(self._process.pid) if processes.name(pid) == name]

    def memory_mib(self) -> float:
        """Memory of its processes, MiB."""
        return processes.memory_mib(self._process.pid)

    def cpu_seconds(self) -> Counter[str]:
        """CPU seconds used by its processes so far, by name."""
        return processes.cpu_seconds(self._process.pid)

    def freeze(self) -> None:
        """Stop all its processes by SIGSTOP: even an idle server uses CPU."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the server run during the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.freeze()

    def _wait_until_ready(self) -> None:
        until, output = time.monotonic() + _READY_S, ""
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(httpx.TransportError):
                answer = httpx.post(
                    f"{self.url}{PATH}",
                    files={"file": self._image},
                    headers=self._headers,
                    timeout=_READY_S,
                )
                if answer.status_code == 200:
                    return
                output = f"{answer.status_code} {answer.text}\n"
                if answer.is_client_error and answer.status_code != 404:  # 404: the route is not deployed yet
                    break
            time.sleep(0.1)
        self._output.seek(0)
        output += self._output.read().decode(errors="replace")
        raise RuntimeError(f"{self.what} does not answer the first image:\n{output}")

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        self._process.terminate()
        until, pids = time.monotonic() + _END_S, set[int]()
        while self._process.poll() is None and time.monotonic() < until:
            pids.update(processes.tree(self._process.pid))
            time.sleep(0.1)
        for pid in pids:  # of processes that outlive their parent
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        self._claim.release()

    def _signal(self, number: signal.Signals) -> None:
        for pid in processes.tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _claim_port() -> tuple[int, FileLock]:
    """Claim a free port; return it with the lock that keeps other benchmarks from it.

    Servers take seconds until they bind the port. HAProxy and some rivals share a bound port silently, and
    requests would be divided between both.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        claim = FileLock(Path(tempfile.gettempdir(), f"scalp-port-{port}.lock"), blocking=False)
        with suppress(Timeout):
            claim.acquire()
            return port, claim
