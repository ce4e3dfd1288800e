"""Kill a job before or after each step by which it changes storage, one step per trial, and run it again.

A trial is a process forked from a server that has imported the job's modules and nothing else, so it takes
tenths of a second. The job is a function of a module, called with arguments that can be pickled.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from typing import Any

from scalp_core import storage

_TRIAL_S = 120


@dataclass(frozen=True)
class Point:
    """A moment of a job: before or after the step of this number, from 0."""

    step: int
    after: bool


def points(skip: Callable[[int], bool] = lambda _: False) -> Iterator[Point]:
    """All moments, without end; those of steps that `skip` names are left out."""
    return (Point(step, after) for step in count() if not skip(step) for after in (False, True))


def run(job: Callable[..., Any], *arguments: Any) -> None:
    """Runs a job in a forked process to its end."""
    code = _exit_code(None, job, arguments)
    assert code == 0, f"the job ended with {code}"


def killed_at(point: Point, job: Callable[..., Any], *arguments: Any) -> bool:
    """Runs a job that is killed at a point; False if it ended well before it came there."""
    code = _exit_code(point, job, arguments)
    assert code in (0, -signal.SIGKILL), f"{point}: the job ended with {code}"
    return code != 0


def _exit_code(point: Point | None, job: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    server = get_context("forkserver")
    server.set_forkserver_preload(["__main__", job.__module__, __name__])
    process = server.Process(target=_trial, args=(point, dict(os.environ), job, arguments))
    process.start()
    process.join(_TRIAL_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{point}: the job did not end within {_TRIAL_S} s")
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def _trial(
    point: Point | None, environment: dict[str, str], job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if point is not None:
        _kill_at(point)
    job(*arguments)
    sys.stdout.flush()
    os._exit(0)


def _kill_at(point: Point) -> None:
    steps = count()
    original = storage.mutation

    @contextmanager
    def counted(kind: str, uri: str) -> Iterator[None]:
        at_the_point = next(steps) == point.step
        if at_the_point and not point.after:
            os.kill(os.getpid(), signal.SIGKILL)
        with original(kind, uri):
            yield
        if at_the_point:
            os.kill(os.getpid(), signal.SIGKILL)

    storage.mutation = counted  # type: ignore[assignment]
