"""`summary.json` of `scalp grade`: counts, speed and settings of all sessions of a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jobs.common import provenance
from jobs.common.console import now, read_json, show
from jobs.grade.files import Listing
from jobs.grade.gather import Totals
from jobs.grade.run import Run
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.inference.decision import NOT_FINITE
from scalp_core.results.drift import measure_drift
from scalp_core.results.progress import REPORT_FILE, SESSIONS
from scalp_core.results.schema import RESULTS_FOLDER


def read_sessions(folder: str) -> list[dict[str, Any]]:
    """Read the sessions of a run or a retry, in their order."""
    sessions = storage.join(folder, SESSIONS)
    return [read_json(storage.join(sessions, name)) or {} for name in sorted(storage.names_in(sessions))]


def make_summary(
    run: Run,
    totals: Totals,
    listing: Listing,
    sessions: list[dict[str, Any]],
    before: dict[str, Any] | None = None,
    retry: str | None = None,
) -> dict[str, Any]:
    """Make the summary of a run, or of a run after a retry; settings and stages are of the last session.

    Args:
        run: Last session of the run.
        totals: Totals of all rows.
        listing: Listing of the run or retry.
        sessions: All sessions.
        before: Summary before the retry.
        retry: Name of the retry. If all rows are accounted for, the summary names it, which ends the retry.
    """
    before, counts, spec = before or {}, totals.counts, run.bundle.spec
    seconds = sum(session["seconds"] for session in sessions)
    photographs = sum(session["photographs"] for session in sessions)
    ended = [retry] if retry and not totals.unaccounted else []
    return {
        "kind": "grade",
        "date": now(),
        "model_version": run.identity.model_version,
        "computed_by": run.identity.computed_by,
        "bundle": run.identity.bundle,
        "synthetic": spec.training.synthetic,
        "symptom": spec.symptom,
        "sources": run.named,
        "rows": counts["rows"],
        "graded": counts["graded"],
        "failed": counts["rows"] - counts["graded"],
        "rows_unaccounted": totals.unaccounted,
        "by_grade": {name: counts["by_grade"].get(name, 0) for name in spec.grade_names},
        "by_error": dict(Counter(counts["by_error"]).most_common()),
        "referred": counts["referred"],
        "by_reason": dict(Counter(counts["by_reason"]).most_common()),
        "other_files": before.get("other_files", listing.other_files + totals.other_files),
        "shadowed_members": before.get("shadowed_members", listing.shadowed + totals.shadowed),
        "repeated": before.get("repeated", listing.repeated),
        "retries": before.get("retries", []) + ended,
        "documents": before.get("documents", []),
        "seconds": round(seconds, 1),
        "seconds_of_stages": run.clock.laps,
        "photographs_per_second": round(photographs / max(seconds, 0.1), 1),
        "machine_hours": round(sum(session["node_seconds"] for session in sessions) / 3600, 4),
        "settings": {**vars(run.model), **vars(run.plan), "models": list(run.plan.models)},
        "versions": provenance.versions(),
        "sessions": sessions,
        "throughput": _throughput(sessions),
        "inputs": totals.inputs and totals.inputs.model_dump(mode="json"),
        "drift": measure_drift(totals.inputs, counts["by_grade"], spec).model_dump(
            include={"level", "flag", "sentence"}
        ),
    }


def _throughput(sessions: list[dict[str, Any]]) -> list[list[float]]:
    """Points of seconds, images and failed images, cumulated over all sessions."""
    points = [[0.0, 0, 0]]
    for session in sessions:
        before = points[-1]
        points += [[before[place] + point[place] for place in range(3)] for point in session["points"]]
    return points


def check_accounts(summary: dict[str, Any], out: str) -> None:
    """Check that each image has exactly one row.

    Raises:
        UserError: Some do not; states their number.
    """
    if summary["rows_unaccounted"]:
        raise UserError(
            f"{summary['rows_unaccounted']:,} images are not accounted for exactly once in {out}; run the "
            "same command again for images without a row, and use another OUT for images with several rows"
        )


def show_summary(summary: dict[str, Any], out: str) -> None:
    """Print the most important entries of the summary."""
    names = ("rows", "graded", "failed", "by_error", "by_grade", "referred", "rows_unaccounted")
    rate = f"{summary['photographs_per_second']:.1f} images/s, {summary['machine_hours']:.3f} machine-hours"
    show(
        "grade",
        {name: summary[name] for name in names}
        | ({NOT_FINITE: count} if (count := summary["by_reason"].get(NOT_FINITE)) else {})
        | {"drift": summary["drift"]["sentence"]}
        | {"seconds": summary["seconds"], "speed": rate}
        | {"results": storage.join(out, RESULTS_FOLDER), "report": storage.join(out, REPORT_FILE)},
    )
