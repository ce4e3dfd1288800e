"""Progress of a run of `scalp grade`, read from the files in its output directory.

run.json                     identity of the run; written at its start
.scalp-work: listing.json    images to grade
             sessions        one file per start of the run, updated every few seconds
summary.json                 written at the end
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scalp_core import storage
from scalp_core.storage.outputs import SCRATCH_FOLDER

IDENTITY_FILE = "run.json"
LISTING_FILE = "listing.json"
SESSIONS = "sessions"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Progress:
    """Progress of a run."""

    sources: list[str]  # sources that the run grades
    model_version: str  # model version in its rows
    done: int  # images with a row, graded or failed
    failed: int  # images that failed
    total: int | None  # all images; None while unknown, as for tars
    photographs_per_second: float | None  # rate of the current session; None before its first images
    finished: bool  # whether each image has exactly one row


def read_progress(out: str) -> Progress | None:
    """Read the progress of the run in an output directory; None if no run has started.

    Raises:
        UserError: A file cannot be read.
    """
    identity = storage.read_json(storage.join(out, IDENTITY_FILE))
    if identity is None:
        return None
    common = {"sources": identity["sources"], "model_version": identity["model_version"]}
    if summary := storage.read_json(storage.join(out, SUMMARY_FILE)):
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
    names = sorted(storage.names_in(folder))
    sessions = [storage.read_json(storage.join(folder, name)) or {} for name in names]
    last = sessions[-1] if sessions else {}
    return Progress(
        **common,
        done=sum(session.get("photographs", 0) for session in sessions),
        failed=sum(session.get("failed", 0) for session in sessions),
        total=_total(storage.read_json(storage.join(work, LISTING_FILE))),
        photographs_per_second=(
            round(last["photographs"] / max(last["seconds"], 0.1), 1) if last.get("photographs") else None
        ),
        finished=False,
    )


def _total(listing: dict[str, Any] | None) -> int | None:
    if listing is None or any(group["tars"] for group in listing["groups"]):
        return None
    return sum(group["photographs"] for group in listing["groups"])
