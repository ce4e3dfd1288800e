"""Servers under test, each in processes of its own: started, frozen while others are measured, ended."""

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

from jobs.bench import processes
from jobs.bench.serve.load import PATH

_READY_S = 120
_END_S = 30


class Server:
    """A program that listens on a port of its own, from `with` to its end.

    Args:
        what: names it.
        command: arguments of Python, with `PORT` where the port goes.
        photograph: a file that it answers once it is ready.
        environment: added to this process's.
        key: that it asks for.
    """

    def __init__(
        self,
        what: str,
        command: list[str],
        photograph: bytes,
        environment: Mapping[str, str],
        key: str | None = None,
    ) -> None:
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.what, self._photograph, self._environment = what, photograph, environment
        self.port, self._claim = _claimed_port()
        self._command = [each.replace("PORT", str(self.port)) for each in command]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        # A Ray of its own.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._output: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, *self._command],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment | dict(self._environment),
        )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def processes(self, name: str) -> list[int]:
        """Its processes of this name."""
        return [pid for pid in processes.tree(self._process.pid) if processes.name(pid) == name]

    def memory_mib(self) -> float:
        """That its processes hold."""
        return processes.memory_mib(self._process.pid)

    def cpu_seconds(self) -> Counter[str]:
        """That its processes have used so far, by their names."""
        return processes.cpu_seconds(self._process.pid)

    def freeze(self) -> None:
        """Stops all its processes: even an idle server wakes up many times a second."""
        self._signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets it run for a while."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.freeze()

    def _wait(self) -> None:
        until, said = time.monotonic() + _READY_S, ""
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(httpx.TransportError):
                answer = httpx.post(
                    f"{self.url}{PATH}",
                    files={"file": self._photograph},
                    headers=self._headers,
                    timeout=_READY_S,
                )
                if answer.status_code == 200:
                    return
                said = f"{answer.status_code} {answer.text}\n"
                if answer.is_client_error and answer.status_code != 404:  # 404: the route is not there yet
                    break
            time.sleep(0.1)
        self._output.seek(0)
        said += self._output.read().decode(errors="replace")
        raise RuntimeError(f"{self.what} does not answer the first photograph:\n{said}")

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        self._process.terminate()
        until, whole = time.monotonic() + _END_S, set[int]()
        while self._process.poll() is None and time.monotonic() < until:
            whole.update(processes.tree(self._process.pid))
            time.sleep(0.1)
        for pid in whole:  # whoever outlives its parent
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        self._claim.release()

    def _signal(self, number: signal.Signals) -> None:
        for pid in processes.tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _claimed_port() -> tuple[int, FileLock]:
    """A free port, and what keeps other benches from it.

    Servers take seconds until they bind it. HAProxy and some of the others share a port then with whoever
    has it, without a word, and each gets a part of the other's photographs.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        claim = FileLock(Path(tempfile.gettempdir(), f"scalp-port-{port}.lock"), blocking=False)
        with suppress(Timeout):
            claim.acquire()
            return port, claim
