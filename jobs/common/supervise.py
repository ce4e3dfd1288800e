"""Supervise a command that runs in one process: start it again where it crashed.

A decoder that crashes its process, or a process that the kernel ends for its memory, must not stop a job. The
command forks before it imports anything large. The parent waits, and forks again after a crash. The new
process resumes the run, as the same command would.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from jobs.common import interrupt
from jobs.common.errors import print_error

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGKILL)
# Crashes in a row without a result in between before the command ends.
_MOST_CRASHES = 4
_BYTES = 8
_PR_SET_PDEATHSIG = 1

_enabled = False
_is_child = False


@dataclass(frozen=True)
class Process:
    """The process of a command.

    Args:
        restarts: Number of its predecessors that crashed.
        count_progress: Function to call after each result.
    """

    restarts: int
    count_progress: Callable[[], None]


def enable() -> None:
    """Allow `fork`, in a process that runs one command and ends."""
    global _enabled
    _enabled = sys.platform == "linux"  # elsewhere a process that forked may not use all libraries


def fork(less_memory: str) -> Process:
    """Continue the command in a child process; this process waits for it, and exits with its code.

    Returns, in the child only, also after a crash in a new child. Without `enable` it forks nothing.

    Args:
        less_memory: What a user can do if the process ends for its memory, for the message.
    """
    if not _enabled:
        return Process(0, lambda: None)
    counter = mmap.mmap(-1, _BYTES)
    restarts = crashes = 0
    while True:
        before, parent = counter[:], os.getpid()
        child = os.fork()
        if not child:
            global _is_child
            _is_child = True
            _end_with(parent)
            interrupt.remember()
            return Process(restarts, lambda: _increment(counter))
        code = _wait(child)
        if code >= 0:
            sys.stdout.flush()
            os._exit(code)
        ended_by = signal.Signals(-code)
        if ended_by not in _CRASHES:
            os._exit(128 - code)
        restarts, crashes = restarts + 1, 1 if counter[:] != before else crashes + 1
        if crashes >= _MOST_CRASHES:
            print_error(
                f"the process ended {crashes} times by {ended_by.name} without a result; if memory ran out, "
                f"{less_memory}"
            )
            os._exit(2)
        print(f"scalp: the process ended by {ended_by.name}; resuming", file=sys.stderr)  # noqa: T201


def end(code: int) -> None:
    """End a forked process without waiting for its threads, which may wait minutes for storage."""
    if _is_child:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int:
    """Wait for the child; forward SIGTERM to it. Returns its exit code, or minus its signal."""
    # A terminal sends Ctrl-C to both.
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM)),
    }
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_with(parent: int) -> None:
    """End this process when its parent ends, where the kernel can do that (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _increment(counter: mmap.mmap) -> None:
    value = int.from_bytes(counter[:], "little") + 1
    counter[:] = value.to_bytes(_BYTES, "little")
