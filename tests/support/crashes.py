"""Kill a job before or after each step by which it changes storage, one step per trial, and run it again.

A trial is a process forked from a server that has imported the job's modules and nothing else, so it takes
tenths of a second. The job is a function of a module, called with arguments that can be pickled.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from scalp_core import storage

_TRIAL_S = 120
_DONE, _KILLED = "done", "killed"


@dataclass(frozen=True)
class Point:
    """Point in a job: before or after the step with this number, from 0."""

    step: int
    after: bool


def points() -> Iterator[Point]:
    """All points, an infinite iterator."""
    return (Point(step, after) for step in count() for after in (False, True))


def run(job: Callable[..., Any], *arguments: Any) -> None:
    """Run a job in a forked process to its end."""
    end = _end_of(None, job, arguments)
    assert end == _DONE, f"the job ended with {end}"


def killed_at(point: Point, job: Callable[..., Any], *arguments: Any) -> bool:
    """Run a job and kill it at a point; False if it succeeded before that point."""
    end = _end_of(point, job, arguments)
    assert end in (_DONE, _KILLED), f"{point}: the job ended with {end}"
    return end == _KILLED


def _end_of(point: Point | None, job: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Report of the trial, or the exit code if its process ended without a report.

    The exit code alone is unreliable: threads that start processes receive each other's codes.
    """
    server = get_context("forkserver")
    server.set_forkserver_preload(["__main__", job.__module__, __name__])
    reader, writer = server.Pipe(duplex=False)
    process = server.Process(target=_trial, args=(writer, point, dict(os.environ), job, arguments))
    process.start()
    writer.close()
    with reader:
        if not reader.poll(_TRIAL_S):
            process.kill()
            raise AssertionError(f"{point}: the job did not end within {_TRIAL_S} s")
        try:
            end = str(reader.recv())
        except EOFError:
            end = ""
    process.join()
    end = end or str(process.exitcode)
    process.close()
    return end


def _trial(
    writer: Connection,
    point: Point | None,
    environment: dict[str, str],
    job: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if point is not None:
        _kill_at(point, writer)
    try:
        job(*arguments)
    except BaseException:
        writer.send(traceback.format_exc())
        raise
    sys.stdout.flush()
    writer.send(_DONE)
    os._exit(0)


def _kill_at(point: Point, writer: Connection) -> None:
    steps = count()
    original = storage.mutation

    def die() -> None:
        writer.send(_KILLED)
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def counted(kind: str, uri: str) -> Iterator[None]:
        at_the_point = next(steps) == point.step
        if at_the_point and not point.after:
            die()
        with original(kind, uri):
            yield
        if at_the_point:
            die()

    storage.mutation = counted  # type: ignore[assignment]
