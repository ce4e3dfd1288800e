"""Time candidates in alternating rounds, and write `summary.json` with machine, versions and date."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, now, progress_bar, write_json
from scalp_core import storage
from scalp_core.storage import outputs

Turn = Callable[[float], list[float]]
"""Repeats a fixed piece of work for at least some seconds; returns the seconds of each repetition."""


@dataclass
class Candidate:
    """Candidate of a benchmark.

    Args:
        name: Name of its row.
        turn: Runs and times the work.
        images: Images per piece of work.
        seconds: Seconds of each repetition.
    """

    name: str
    turn: Turn
    images: int
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def median(self) -> float:
        """Median seconds per piece of work."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Images per second at the median."""
        return self.images / self.median


def repeat(work: Callable[[], Any], seconds: float) -> list[float]:
    """Repeat `work` for `seconds`, at least once; return the seconds of each repetition."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken


def time_in_turns(what: str, candidates: list[Candidate], rounds: int, seconds: float) -> None:
    """Time all candidates once per round, so that disturbances of the machine affect all of them.

    Args:
        what: Title of the progress bar.
        candidates: Candidates; their `seconds` are filled.
        rounds: Rounds, after one that is not counted.
        seconds: Shortest time per candidate and round.
    """
    with progress_bar(what, (1 + rounds) * len(candidates)) as (progress, task):
        for number in range(1 + rounds):
            for candidate in candidates:
                progress.update(task, note=candidate.name)
                # The first round compiles, allocates and fills caches.
                taken = candidate.turn(seconds if number else 0)
                candidate.seconds += taken if number else []
                progress.update(task, advance=1)


class OwnProcess:
    """Separate process for one candidate, which isolates its memory and allocator.

    glibc returns large blocks to the kernel or keeps them, depending on earlier frees. PyTorch's speed on a
    CPU differs by half between the two, so candidates in one process would affect each other.

    Args:
        setup: Called once in the process; None: nothing to prepare.
        arguments: Picklable arguments of `setup`.
    """

    def __init__(self, setup: Callable[..., None] | None = None, *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), setup, arguments)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a module-level function in the process, and return its result."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def marker(kind: str) -> str:
    """Kind with which a benchmark claims its output folder."""
    return f"bench {kind}"


def write_result(
    out: str,
    kind: str,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    ratios: Mapping[str, float | None],
    **more: Any,
) -> dict[str, Any]:
    """Write `out/summary.json`: results with machine, versions, revision and date.

    Raises:
        UserError: `out` holds something else.
    """
    outputs.claim_output(out, marker(kind))
    result = {
        "kind": kind,
        "command": _command(),
        "date": now(),
        "git_revision": provenance.git_revision(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "settings": dict(settings),
        "rows": rows,
        "ratios": {name: value and round(value, 3) for name, value in ratios.items()},
        **more,
    }
    write_json(storage.join(storage.absolute(out), SUMMARY_FILE), result)
    return result


def _command() -> str:
    """Command of this process, as it was typed."""
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])
