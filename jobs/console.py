"""What the verbs show and leave behind: progress, a short table, `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from scalp_core import storage

console = Console(highlight=False, soft_wrap=True)

SUMMARY_FILE = "summary.json"


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[tuple[Progress, Any]]:
    """A bar with count, time taken and time left; on a terminal only, so that logs stay short."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total, note="")


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


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(uri: str, content: Mapping[str, Any]) -> None:
    storage.write(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(uri: str) -> dict[str, Any] | None:
    """The content of a JSON file of ours; None when it is not there."""
    return json.loads(storage.read(uri)) if storage.exists(uri) else None
