"""Lease on an output directory: one run at a time; the lease of a dead run is taken over.

`OUT/.scalp-lease/NNNNNN.json` is made by a conditional create; the highest number, the epoch, is the lease.
Its owner rewrites the file every few seconds. A run on this machine is alive while its process is. A run on
another machine is dead when its heartbeat has not changed for `DEAD_S` seconds by this machine's clock; the
clocks of two machines are not compared.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from scalp_core import storage
from scalp_core.errors import UserError

FOLDER = ".scalp-lease"
BEAT_S = 5.0
DEAD_S = 30.0
_POLL_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """Check in workers that the run which started them still holds the lease `epoch` of `out`."""

    out: str
    epoch: int

    def check(self) -> None:
        """Raise a `UserError` if another run took over."""
        newest = _newest(self.out)
        if newest != self.epoch:
            raise UserError(
                f"{self.out} was taken over by another run (lease {newest}, this one had {self.epoch}); "
                "this run stops and leaves the output to it"
            )


@contextmanager
def hold(out: str, verb: str) -> Iterator[Guard]:
    """Hold the lease on an output directory while the block runs; other runs' errors name `verb`.

    Raises:
        UserError: another run holds the lease.
    """
    guard, state = _acquire(out, verb)
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(guard, state, stop), daemon=True, name="scalp-lease")
    thread.start()
    try:
        yield guard
    finally:
        stop.set()
        thread.join()
        with suppress(UserError):  # storage is unavailable: the stopped heartbeat releases it later
            if _newest(out) == guard.epoch:
                storage.write(_file(guard), _json(state | {"released": True}))


def remove(guard: Guard) -> None:
    """Remove a lease that this process has released, and the folder of leases if it is then empty."""
    storage.remove_file(_file(guard))
    if not storage.is_s3(guard.out):
        with suppress(OSError):  # it holds another run's lease
            Path(guard.out, FOLDER).rmdir()


def _acquire(out: str, verb: str) -> tuple[Guard, dict[str, Any]]:
    state = {
        "verb": verb,
        "owner": uuid.uuid4().hex,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "beat": 0,
        "released": False,
    }
    while True:
        newest = _newest(out)
        if newest:
            _refuse_if_alive(Guard(out, newest))
        guard = Guard(out, newest + 1)
        if not storage.create(_file(guard), _json(state)):
            continue  # another run was faster
        if _newest(out) != guard.epoch:  # `newest` was outdated: a later run came and ended
            storage.remove_file(_file(guard))
            continue
        for epoch in _epochs(out):
            if epoch < guard.epoch:
                storage.remove_file(_file(Guard(out, epoch)))
        return guard, state


def _refuse_if_alive(guard: Guard) -> None:
    """Return if the run that held a lease has released it or is dead.

    Raises:
        UserError: the run is alive.
    """
    state = storage.read_json(_file(guard))
    if state is None or state["released"]:
        return
    if state["machine"] == _machine():
        if _is_running(state["pid"], state["process_started"]):
            raise _in_use(guard.out, state)
        logger.warning("%s: process %d of the last run is gone; taking over", guard.out, state["pid"])
        return
    logger.warning(
        "%s: a run on %s holds the lease; waiting up to %.0f s for its heartbeat",
        guard.out, state["host"], DEAD_S,
    )  # fmt: skip
    until = time.monotonic() + DEAD_S
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        current = storage.read_json(_file(guard))
        if current is None or current["released"]:
            return
        if current["beat"] != state["beat"]:
            raise _in_use(guard.out, state)
    logger.warning("%s: the run on %s sent no heartbeat; taking over", guard.out, state["host"])


def _in_use(out: str, state: dict[str, Any]) -> UserError:
    return UserError(
        f"{out} is in use by scalp {state['verb']} on {state['host']} (process {state['pid']}, since "
        f"{state['started_at']}); wait for it, or choose another OUT"
    )


def _beat(guard: Guard, state: dict[str, Any], stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(BEAT_S):
        beat += 1
        try:
            if _newest(guard.out) != guard.epoch:
                logger.error("%s was taken over by another run", guard.out)
                return
            storage.write(_file(guard), _json(state | {"beat": beat}), durable=False)
        except UserError as error:
            logger.warning("the lease on %s could not be renewed: %s", guard.out, error)


def _is_running(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False


def _machine() -> str:
    """Identify the boot and process namespace in which this process can look up others by pid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  (not a path)
    except OSError:  # not Linux
        return platform.node()


def _newest(out: str) -> int:
    return max(_epochs(out), default=0)


def _epochs(out: str) -> list[int]:
    names = storage.names_in(storage.join(out, FOLDER))
    return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal())


def _file(guard: Guard) -> str:
    return storage.join(guard.out, FOLDER, f"{guard.epoch:06d}.json")


def _json(state: dict[str, Any]) -> bytes:
    return json.dumps(state).encode()
