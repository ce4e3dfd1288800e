"""What the verbs show and leave behind: progress, a short table, `summary.json`."""

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

# Names of files are anybody's: what stands in brackets in them is no markup.
console = Console(highlight=False, soft_wrap=True, markup=False)

_CALM_S = 30.0
SUMMARY_FILE = "summary.json"


@contextmanager
def progress_bar(what: str, total: int | None, done: int = 0) -> Iterator[tuple[Progress, Any]]:
    """A bar with count, time taken and time left; in a log, a line every half minute.

    Args:
        what: is done.
        total: of it; None where nobody knows.
        done: of it before, which says nothing of the speed.
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
    with _Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total, completed=done, note="")


class _Progress(Progress):
    """Where there is no terminal to draw on, it says now and then how far it is."""

    _said = float("inf")

    def start(self) -> None:
        super().start()
        self._said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self.disable and time.monotonic() - self._said > _CALM_S:
            self._said = time.monotonic()
            task = self.tasks[task_id]
            total = f" of {task.total:,.0f}" if task.total else ""
            left = task.time_remaining
            words = (task.fields["note"], "" if left is None else f"{timedelta(seconds=round(left))} left")
            self.console.print(
                f"{task.description}: {task.completed:,.0f}{total} {', '.join(filter(None, words))}".rstrip()
            )


class Clock:
    """Seconds of each stage; the first begins now, with the command, and holds the start of Ray."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """A stage ends."""
        moment = time.monotonic()
        self.laps[stage], self._last = round(moment - self._last, 1), moment

    def total(self) -> float:
        """Seconds so far."""
        return round(time.monotonic() - self._started, 1)


def show(title: str, rows: Mapping[str, Any]) -> None:
    """Prints a two-column table."""
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


def printable(text: str) -> str:
    """One line for a terminal, which may obey what stands in the name of a file."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return moment(datetime.now(UTC))


def moment(at: datetime | None) -> str:
    """ISO 8601, to the second; nothing for what has not been."""
    return at.isoformat(timespec="seconds") if at else ""


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    storage.write(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(uri: str) -> dict[str, Any] | None:
    """The content of a JSON file of ours; None when it is not there."""
    return json.loads(storage.read(uri)) if storage.exists(uri) else None
