"""What runs on the cluster for `scalp submit`: the versions are compared, the verb runs, its log is kept.

python -m jobs.job_entry [--log URI] [--versions FILE] VERB ARGUMENTS…
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from cluster.local import ClusterError, connect
from cluster.nodes import ask_every_node
from scalp_core import provenance, storage
from scalp_core.errors import UserError

# The log is copied to storage now and then, so that it outlives the cluster.
_BETWEEN_COPIES_S = 60.0
VERSIONS_FILE = "versions.json"  # of who submitted, in the folder of the job
_MISMATCHES_SHOWN = 4
_NOT_COMPARED = ("scalp",)  # comes with the job


def main() -> int:
    """The exit code of the verb; 2 if it was not begun."""
    words = sys.argv[1:]
    log, expected = _taken(words, "--log"), _taken(words, "--versions")
    kept = _Kept(log)
    try:
        if expected:
            _check_versions(json.loads(Path(expected).read_text()))
        return _run(words, kept)
    except (UserError, ClusterError) as error:
        kept.print(f"scalp: {error}\n")
        return 2
    finally:
        kept.copy()


def _taken(words: list[str], option: str) -> str | None:
    """Takes one of our own options away, which come before the verb."""
    if words[:1] != [option]:
        return None
    _, value, *words[:] = words
    return value


def _check_versions(expected: dict[str, str]) -> None:
    """Refuses a cluster whose packages decide otherwise than those of who submitted.

    Raises:
        ClusterError: names the node and the packages.
    """
    connect()
    for node, versions in ask_every_node(provenance.versions).items():
        differ = [
            f"{name} {versions.get(name, 'missing')} there and {wanted} here"
            for name, wanted in expected.items()
            if name not in _NOT_COMPARED and _public(name, versions.get(name, "")) != _public(name, wanted)
        ]
        if differ:
            more = f" and {len(differ) - _MISMATCHES_SHOWN} more" if len(differ) > _MISMATCHES_SHOWN else ""
            raise ClusterError(
                f"node {node} has {', '.join(differ[:_MISMATCHES_SHOWN])}{more}; install both from one "
                "requirements.lock, or submit with --any-versions"
            )


def _public(name: str, version: str) -> str:
    """Without the build, such as +cu130, which a laptop has not; of Python without the last number."""
    parts = version.split("+")[0].split(".")
    return ".".join(parts[:2] if name == "python" else parts)


class _Kept:
    """All that was printed, shown to Ray and kept in storage."""

    def __init__(self, uri: str | None) -> None:
        self._uri, self._pieces = uri, bytearray()
        self._lock, self._copying = threading.Lock(), threading.Lock()

    def print(self, text: str) -> None:
        self.add(text.encode())

    def add(self, piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        with self._lock:
            self._pieces += piece

    def copy(self) -> None:
        """A log that cannot be kept stops no work; one copy after the other, so that the last is whole."""
        if not self._uri:
            return
        with self._copying:
            with self._lock:
                content = bytes(self._pieces)
            try:
                storage.write(self._uri, content)
            except (OSError, UserError) as error:
                print(f"scalp: the log is not kept: {error}", file=sys.stderr)  # noqa: T201


def _run(words: list[str], kept: _Kept) -> int:
    """The verb in a process of its own, which may die as it likes."""
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as verb:

        def stop(number: int, _: FrameType | None) -> None:
            verb.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        copied = time.monotonic()
        for line in verb.stdout or ():
            kept.add(line)
            if time.monotonic() - copied > _BETWEEN_COPIES_S:
                copied = time.monotonic()
                threading.Thread(target=kept.copy, daemon=True).start()
    return verb.returncode if verb.returncode >= 0 else 128 - verb.returncode


if __name__ == "__main__":
    sys.exit(main())
