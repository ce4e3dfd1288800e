"""Ctrl-C: the exit code of an interrupted command, and of one that only detached from a job."""

from __future__ import annotations

import signal
from types import FrameType

INTERRUPTED = 130  # what typer makes of Ctrl-C

_is_requested = False


class Detached(SystemExit):
    """Ctrl-C on a followed job: the command ends, and the job continues."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


def remember() -> None:
    """Let `check` raise `KeyboardInterrupt` again: a library that is called at that moment may swallow it."""

    def request(number: int, frame: FrameType | None) -> None:
        global _is_requested
        _is_requested = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, request)


def check() -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C was pressed since `remember`."""
    if _is_requested:
        raise KeyboardInterrupt
