"""What runs on the cluster for `scalp submit`: the versions are compared, the verb runs, its log is kept.

python -m jobs.submit.entry [--log URI] [--versions FILE] VERB ARGUMENTS…
"""

from __future__ import annotations

import json
import os
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

from cluster.local import ClusterError, connect
from cluster.nodes import run_on_each_node
from jobs.common import provenance
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import outputs

# The log is kept in storage now and then, so that it outlives the cluster.
_BETWEEN_PIECES_S = 60.0
_COPIED_AT_ONCE = 1 << 20
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
        kept.keep_all()


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
    try:
        answers = run_on_each_node(provenance.versions)
    finally:
        ray.shutdown()  # the verb is a driver; a second one would take 150 MB of the head as long as it runs
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
                "requirements.lock, or submit with --any-versions"
            )


def _public(name: str, version: str) -> str:
    """Without the build, such as +cu130, which a laptop has not; of Python without the last number."""
    parts = version.split("+")[0].split(".")
    return ".".join(parts[:2] if name == "python" else parts)


class _Kept:
    """Shows all that is printed to Ray, and keeps it in storage where the verb has made its OUT.

    While the verb runs, what it printed since the last piece is a piece of its own, URI.00001 and on: object
    storage has no files that grow. At the end the whole log takes their place.
    """

    def __init__(self, uri: str | None) -> None:
        self._uri = uri
        # On the disk: a log of days is not held in memory. It is open for as long as the process lives.
        self._log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._printed = self._kept = self._pieces = 0
        self._keeping = threading.Lock()

    def print(self, text: str) -> None:
        self.add(text.encode())

    def add(self, text: bytes) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        if self._uri is None:
            return
        try:
            self._printed += self._log.write(text)
        except OSError as error:
            self._complain(error)
            self._uri = None

    def keep_new(self) -> None:
        """Keeps what was printed since the last time. A log that cannot be kept stops no work."""
        with self._keeping:
            try:
                if self._is_made() and (new := self._read(self._printed)):
                    storage.write(self._piece(self._pieces + 1), new)
                    self._pieces += 1
                    self._kept += len(new)
            except (OSError, UserError) as error:
                self._complain(error)

    def keep_all(self) -> None:
        """Keeps the whole log in one file, once the verb has ended."""
        with self._keeping:
            try:
                if not self._is_made():
                    return
                self._log.seek(0)
                with storage.new_file(str(self._uri)) as file:
                    shutil.copyfileobj(self._log, file, _COPIED_AT_ONCE)
                for number in range(1, self._pieces + 1):
                    storage.remove_file(self._piece(number))
            except (OSError, UserError) as error:
                self._complain(error)

    def _is_made(self) -> bool:
        """Whether OUT, of OUT/jobs/ID.log, is a verb's: into a folder of somebody else nothing is written."""
        return self._uri is not None and storage.exists(
            storage.join(self._uri.rsplit("/", 2)[0], outputs.MARKER_FILE)
        )

    def _read(self, until: int) -> bytes:
        """What was not kept yet; from any thread, while the verb prints on."""
        return os.pread(self._log.fileno(), until - self._kept, self._kept)

    def _piece(self, number: int) -> str:
        return f"{self._uri}.{number:05d}"

    def _complain(self, error: Exception) -> None:
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
        since = time.monotonic()
        for line in verb.stdout or ():
            kept.add(line)
            if time.monotonic() - since > _BETWEEN_PIECES_S:
                since = time.monotonic()
                threading.Thread(target=kept.keep_new, daemon=True).start()
    return verb.returncode if verb.returncode >= 0 else 128 - verb.returncode


if __name__ == "__main__":
    sys.exit(main())
