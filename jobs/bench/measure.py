"""How candidates are timed beside each other, and what is written beside the figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, now, progress_bar, write_json
from scalp_core import storage
from scalp_core.storage import outputs

Turn = Callable[[float], list[float]]
"""Repeats a fixed piece of work for so many seconds; seconds that each repetition took."""


@dataclass
class Candidate:
    """One thing to time.

    Args:
        name: of its row.
        turn: does the work.
        photographs: in one piece of work.
    """

    name: str
    turn: Turn
    photographs: int
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def median(self) -> float:
        """Seconds for one piece of work, the middle one of all that were timed."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Photographs a second at the median."""
        return self.photographs / self.median


def repeat(work: Callable[[], Any], seconds: float) -> list[float]:
    """Does the work until `seconds` are over, at least once; how long each time took."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken


def time_in_turns(what: str, candidates: list[Candidate], rounds: int, seconds: float) -> None:
    """Times all candidates in every round, so that what disturbs the machine meets all of them.

    Args:
        what: for the progress bar.
        candidates: their `seconds` are filled.
        rounds: times that each gets its turn, after one that is not counted.
        seconds: that a turn lasts at least.
    """
    with progress_bar(what, (1 + rounds) * len(candidates)) as (progress, task):
        for number in range(1 + rounds):
            for candidate in candidates:
                progress.update(task, note=candidate.name)
                # The first calls compile, allocate and fill caches.
                taken = candidate.turn(seconds if number else 0)
                candidate.seconds += taken if number else []
                progress.update(task, advance=1)


class OwnProcess:
    """A process for one candidate: its memory is its own, and so are the habits of its allocator.

    glibc gives large blocks back to the kernel or keeps them, by what was freed before. PyTorch's speed on a
    CPU differs by half between the two, so candidates that share a process would time each other.

    Args:
        setup: called once in the process.
        arguments: of it; picklable.
    """

    def __init__(self, setup: Callable[..., None], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), setup, arguments)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a module's function there and waits for its result."""
        return self._pool.submit(function, *arguments).result()

    def peak_mib(self) -> float:
        """The most memory that it has held so far, as the kernel counted."""
        return self.call(provenance.peak_mib)

    def close(self) -> None:
        self._pool.shutdown()


def marker(kind: str) -> str:
    """By what a bench marks its folder."""
    return f"bench {kind}"


def write_result(
    out: str,
    kind: str,
    settings: Mapping[str, Any],
    rows: list[dict[str, Any]],
    ratios: Mapping[str, float | None],
    **more: Any,
) -> dict[str, Any]:
    """Writes `out/summary.json`: the figures with machine, versions, revision and date.

    Raises:
        UserError: `out` is not empty, and of something else.
    """
    outputs.claim_output(out, marker(kind))
    result = {
        "kind": kind,
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
