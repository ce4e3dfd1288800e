"""How far a run of `scalp grade` is, read from what it leaves in OUT by whoever has no part in it.

run.json                     what all rows have in common; written when the run begins
.scalp-work: listing.json    what there is to grade
             sessions        one file per time that it ran, written again every few seconds
summary.json                 it has ended
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage.outputs import SCRATCH_FOLDER

IDENTITY_FILE = "run.json"
LISTING_FILE = "listing.json"
SESSIONS = "sessions"
REPORT_FILE = "report.html"
_SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Progress:
    """What is known of a run.

    Args:
        sources: that it grades.
        model_version: that signs its rows.
        done: photographs that have a row, graded or failed.
        failed: of these.
        total: photographs in all; None while it is not known, as of tars.
        photographs_per_second: at work; None before the first ones.
        finished: every photograph has its one row.
    """

    sources: list[str]
    model_version: str
    done: int
    failed: int
    total: int | None
    photographs_per_second: float | None
    finished: bool


def read_progress(out: str) -> Progress | None:
    """The progress of the run with this output; None where none has begun.

    Raises:
        UserError: storage refused.
    """
    identity = read_json_file(storage.join(out, IDENTITY_FILE))
    if identity is None:
        return None
    common = {"sources": identity["sources"], "model_version": identity["model_version"]}
    if summary := read_json_file(storage.join(out, _SUMMARY_FILE)):
        return Progress(
            **common,
            done=summary["rows"],
            failed=summary["failed"],
            total=summary["rows"],
            photographs_per_second=summary["photographs_per_second"],
            finished=not summary["rows_unaccounted"],
        )
    work = storage.join(out, SCRATCH_FOLDER)
    folder = storage.join(work, SESSIONS)
    sessions = [read_json_file(storage.join(folder, name)) or {} for name in sorted(storage.names_in(folder))]
    last = sessions[-1] if sessions else {}
    return Progress(
        **common,
        done=sum(session.get("photographs", 0) for session in sessions),
        failed=sum(session.get("failed", 0) for session in sessions),
        total=_total(read_json_file(storage.join(work, LISTING_FILE))),
        photographs_per_second=(
            round(last["photographs"] / last["seconds"], 1) if last.get("photographs") else None
        ),
        finished=False,
    )


def _total(listing: dict[str, Any] | None) -> int | None:
    if listing is None or any(group["tars"] for group in listing["groups"]):
        return None
    return sum(group["photographs"] for group in listing["groups"])


def read_json_file(uri: str) -> dict[str, Any] | None:
    """A file of JSON; None if there is none, or if it was removed since it was listed."""
    try:
        return dict(json.loads(storage.read(uri)))
    except UserError as error:
        if storage.is_missing(error.__cause__ or error):
            return None
        raise
