"""Console output of the commands: progress bars, short tables; and `summary.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from scalp_core import storage

# File names are untrusted: brackets in them must not be read as markup.
console = Console(highlight=False, soft_wrap=True, markup=False)

_REPORT_INTERVAL_S = 30.0
SUMMARY_FILE = "summary.json"


@contextmanager
def progress_bar(
    what: str, total: int | None, done: int = 0, as_lines: bool = False
) -> Iterator[tuple[Progress, Any]]:
    """Progress bar with count, elapsed and remaining time; without a terminal, one line per 30 seconds.

    Args:
        what: Activity, for example "grading".
        total: Items in total; None if unknown.
        done: Items of earlier runs, left out of the speed.
        as_lines: Print lines on a terminal too, because other work prints at the same time.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with _Progress(*columns, console=console, disable=as_lines or not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total, completed=done, note="")


class _Progress(Progress):
    """Progress bar that prints one line per `_REPORT_INTERVAL_S` without a terminal."""

    _reported = float("inf")

    def start(self) -> None:
        super().start()
        self._reported = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.disable and time.monotonic() - self._reported > _REPORT_INTERVAL_S:
            self._reported = time.monotonic()
            task = self.tasks[task_id]
            total = f" of {task.total:,.0f}" if task.total else ""
            left = task.time_remaining
            words = (task.fields["note"], "" if left is None else f"{timedelta(seconds=round(left))} left")
            self.console.print(
                f"{task.description}: {task.completed:,.0f}{total} {', '.join(filter(None, words))}".rstrip()
            )


class Clock:
    """Measure the seconds of each stage; the first stage begins now, and includes the start of Ray."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """End a stage, and begin the next one."""
        moment = time.monotonic()
        self.laps[stage], self._last = round(moment - self._last, 1), moment

    def total(self) -> float:
        """Seconds since the clock was made."""
        return round(time.monotonic() - self._started, 1)


def show(title: str, rows: Mapping[str, Any]) -> None:
    """Print a two-column table."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for name, value in rows.items():
        table.add_row(name, _text(value))
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    return str(value)


def print_json(content: Any) -> None:
    """Print one JSON document on standard output; times in ISO 8601."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))  # noqa: T201


def now() -> str:
    """Current time in UTC, ISO 8601, to the second."""
    return moment(datetime.now(UTC))


def moment(at: datetime | None) -> str:
    """Format a time as ISO 8601, to the second; empty for None."""
    return at.isoformat(timespec="seconds") if at else ""


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    """Atomically write `content` to a JSON file."""
    storage.write(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


read_json = storage.read_json


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the duration of the block to `seconds[stage]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started
