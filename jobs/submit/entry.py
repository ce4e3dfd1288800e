"""Entry point of a job of `scalp submit`: compare versions, run the command, store its log.

python -m jobs.submit.entry [--log URI] [--versions FILE] VERB ARGUMENTS…
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import ray

from cluster.local import connect
from cluster.nodes import run_on_each_node
from cluster.resources import ClusterError
from jobs.common import provenance
from jobs.common.errors import format_error, print_error
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import outputs

_STORE_INTERVAL_S = 60.0
_STORE_PAUSE = 50  # times as long as the last storing, whose size grows
_COPY_CHUNK_BYTES = 1 << 20
VERSIONS_FILE = "versions.json"  # of the submitting machine, in the folder of the job
_MISMATCHES_SHOWN = 4
_NOT_COMPARED = ("scalp",)  # comes with the job


def main() -> int:
    """Run the job; return the exit code of the command, or 2 if it was not started."""
    words = sys.argv[1:]
    log_uri, expected = _pop_option(words, "--log"), _pop_option(words, "--versions")
    log = _StoredLog(log_uri)
    try:
        if expected:
            _check_versions(json.loads(Path(expected).read_text()))
        return _run(words, log)
    except (UserError, ClusterError) as error:
        log.add(f"{format_error(str(error))}\n".encode())
        return 2
    finally:
        log.store()


def _pop_option(words: list[str], option: str) -> str | None:
    """Remove an option of this module, which precedes the command; return its value."""
    if words[:1] != [option]:
        return None
    _, value, *words[:] = words
    return value


def _check_versions(expected: dict[str, str]) -> None:
    """Refuse a cluster whose package versions differ from those of the submitting machine.

    Raises:
        ClusterError: Versions differ; names the node and the packages.
    """
    connect()
    try:
        answers = run_on_each_node(provenance.versions)
    finally:
        ray.shutdown()  # the command is a driver itself; a second one would take 150 MB of the head
    for node, versions in answers.items():
        differ = [
            f"{name} {versions.get(name, 'missing')} there and {wanted} here"
            for name, wanted in expected.items()
            if name not in _NOT_COMPARED and _public(name, versions.get(name, "")) != _public(name, wanted)
        ]
        if differ:
            more = f" and {len(differ) - _MISMATCHES_SHOWN} more" if len(differ) > _MISMATCHES_SHOWN else ""
            raise ClusterError(
                f"node {node} has {', '.join(differ[:_MISMATCHES_SHOWN])}{more}; install both from one "
                "requirements.lock, or submit with --allow-mismatch"
            )


def _public(name: str, version: str) -> str:
    """Version without its build tag, such as +cu130; of Python without the patch number."""
    parts = version.split("+")[0].split(".")
    return ".".join(parts[:2] if name == "python" else parts)


class _StoredLog:
    """Print the output of the command for Ray, and store it next to OUT, if the command has made its OUT."""

    def __init__(self, uri: str | None) -> None:
        self._uri = uri
        # On disk: the log of days does not fit into memory. Open until the process ends.
        self._log = tempfile.NamedTemporaryFile(buffering=0)  # noqa: SIM115
        self._storing = threading.Lock()

    def add(self, text: bytes) -> None:
        """Print and record output of the command."""
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        try:
            self._log.write(text)
        except OSError as error:
            self._uri = None
            self._complain(error)

    def store(self) -> None:
        """Store the output so far; an error is printed and does not stop the command."""
        if (uri := self._uri) is None:
            return
        # Without its marker, scalp did not make OUT of OUT/jobs/ID.log: other folders get no log.
        marker = storage.join(uri.rsplit("/", 2)[0], outputs.MARKER_FILE)
        with self._storing:
            try:
                if storage.exists(marker):
                    with Path(self._log.name).open("rb") as log, storage.new_file(uri) as file:
                        shutil.copyfileobj(log, file, _COPY_CHUNK_BYTES)
            except (OSError, UserError) as error:
                self._complain(error)

    def store_regularly(self) -> None:
        """Store the output each minute, so that it outlives the cluster; a large log less often."""
        wait = _STORE_INTERVAL_S
        while True:
            time.sleep(wait)
            started = time.monotonic()
            self.store()
            wait = max(_STORE_INTERVAL_S, _STORE_PAUSE * (time.monotonic() - started))

    def _complain(self, error: Exception) -> None:
        print_error(f"the log is not stored: {error}")


def _run(words: list[str], log: _StoredLog) -> int:
    """Run the command in a child process; return its exit code."""
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:

        def stop(number: int, _: FrameType | None) -> None:
            process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        threading.Thread(target=log.store_regularly, daemon=True).start()
        for line in process.stdout or ():
            log.add(line)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main())
