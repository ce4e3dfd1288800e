"""`summary.json` of `scalp grade`: counts, speed and settings of all sessions of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.common import provenance
from jobs.common.console import now, read_json, show
from jobs.grade.files import Listing
from jobs.grade.gather import Found
from jobs.grade.identity import Identity
from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.inference.decision import NOT_FINITE
from scalp_core.results.drift import measure_drift
from scalp_core.results.progress import REPORT_FILE, SESSIONS
from scalp_core.results.schema import RESULTS_FOLDER


@dataclass(frozen=True)
class Described:
    """What of a run stands in its summary beside the counts.

    Args:
        identity: of the output.
        sources: that were graded.
        spec: its contract.
        settings: of the last session.
        laps: seconds of each stage of the last session.
    """

    identity: Identity
    sources: list[str]
    spec: BundleSpec
    settings: dict[str, Any]
    laps: dict[str, float]


def read_sessions(folder: str) -> list[dict[str, Any]]:
    """The sessions of a run or a retry, in their order."""
    sessions = storage.join(folder, SESSIONS)
    return [read_json(storage.join(sessions, name)) or {} for name in sorted(storage.names_in(sessions))]


def make_summary(
    run: Described,
    found: Found,
    listing: Listing,
    sessions: list[dict[str, Any]],
    before: dict[str, Any] | None = None,
    retry: str | None = None,
) -> dict[str, Any]:
    """The summary of a run, or of a retry.

    Args:
        run: what was run.
        found: what the rows say.
        listing: what there was to grade.
        sessions: all of them.
        before: summary before a retry.
        retry: its name. The summary names it only if all rows are accounted for, and with that it is over.
    """
    before = before or {}
    seconds = sum(session["seconds"] for session in sessions)
    graded = sum(found.by_grade.values())
    photographs = sum(session["photographs"] for session in sessions)
    ended = [retry] if retry and not found.unaccounted else []
    return {
        "kind": "grade",
        "date": now(),
        "model_version": run.identity.model_version,
        "computed_by": run.identity.computed_by,
        "bundle": run.identity.bundle,
        "synthetic": run.spec.training.synthetic,
        "sources": run.sources,
        "rows": found.rows,
        "graded": graded,
        "failed": found.rows - graded,
        "rows_unaccounted": found.unaccounted,
        "graded_again": found.again,
        "by_grade": {name: found.by_grade[name] for name in run.spec.grade_names},
        "by_error": dict(found.by_error.most_common()),
        "referred": found.referred,
        "by_reason": dict(found.by_reason.most_common()),
        "other_files": before.get("other_files", listing.other_files + found.other_files),
        "shadowed_members": before.get("shadowed_members", listing.shadowed + found.shadowed),
        "repeated": before.get("repeated", listing.repeated),
        "retries": before.get("retries", []) + ended,
        "seconds": round(seconds, 1),
        "seconds_of_stages": run.laps,
        "photographs_per_second": round(photographs / max(seconds, 0.1), 1),
        "machine_hours": round(sum(session["node_seconds"] for session in sessions) / 3600, 4),
        "settings": run.settings,
        "versions": provenance.versions(),
        "sessions": sessions,
        "throughput": _throughput(sessions),
        "inputs": found.inputs and found.inputs.model_dump(mode="json"),
        "drift": measure_drift(found.inputs, found.by_grade, run.spec).model_dump(
            include={"level", "flag", "sentence"}
        ),
    }


def _throughput(sessions: list[dict[str, Any]]) -> list[list[float]]:
    """Seconds at work, images and failed, over all sessions."""
    points = [[0.0, 0, 0]]
    for session in sessions:
        before = points[-1]
        points += [[before[place] + point[place] for place in range(3)] for point in session["points"]]
    return points


def check_accounts(summary: dict[str, Any], out: str) -> None:
    """Refuse to call a run a success of which an image lacks its one row.

    Raises:
        UserError: so many do.
    """
    if summary["rows_unaccounted"]:
        raise UserError(
            f"{summary['rows_unaccounted']:,} photographs are not accounted for exactly once in {out}; run "
            "the same command again for those without a row, and with another OUT for those with several"
        )


def show_summary(summary: dict[str, Any], out: str) -> None:
    """Print what a user wants to see first."""
    names = (
        "rows",
        "graded",
        "failed",
        "by_error",
        "by_grade",
        "referred",
        "rows_unaccounted",
        "graded_again",
    )
    rate = (
        f"{summary['photographs_per_second']:.1f} photographs/s, {summary['machine_hours']:.3f} machine-hours"
    )
    show(
        "grade",
        {name: summary[name] for name in names}
        | ({NOT_FINITE: count} if (count := summary["by_reason"].get(NOT_FINITE)) else {})
        | {"drift": summary["drift"]["sentence"]}
        | {"seconds": summary["seconds"], "speed": rate}
        | {"results": storage.join(out, RESULTS_FOLDER), "report": storage.join(out, REPORT_FILE)},
    )
