"""Summary of a `scalp prepare` run: its accounts are checked, and its table printed."""

from __future__ import annotations

from typing import Any

from jobs.common.console import console, show
from scalp_core import storage
from scalp_core.datasets.manifest import SPLITS, DataSpec
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES
from scalp_core.reports import data as data_report

REPORT_FILE = "report.html"


def check_accounts(summary: dict[str, Any], out: str) -> None:
    """Check that each listed object was examined, and each image was kept or dropped with a reason."""
    listed, examined = summary["objects_listed"], sum(summary["objects"].values())
    if examined < listed:  # a tar is listed as one object, and becomes its members
        raise UserError(
            f"{listed} objects were listed in {summary['source']}, but {examined} examined; prepare it again "
            f"into another directory than {out}, and report this"
        )
    images = summary["objects"].get("photograph", 0)
    others = sum(summary["dropped_other"].values())
    kept, dropped = summary["photographs"], sum(summary["dropped"].values()) - others
    if kept + dropped != images:
        raise UserError(
            f"{images} images were found in {summary['source']}, but {kept} kept and {dropped} "
            f"dropped in {out}; prepare it again into another directory, and report this"
        )


def show_summary(spec: DataSpec, summary: dict[str, Any], out: str) -> None:
    """Print the table of a run, and the warnings about its data."""
    rows: dict[str, Any] = {
        "images": summary["photographs"],
        "left out": summary["dropped"],
        **({"soft labels": spec.soft_labels} if spec.soft_labels else {}),
        **_agreement(summary.get("label_log")),
        "found": {word: count for word, count in summary["findings"].items() if count},
    }
    for name in SPLITS:
        part = summary["parts"][name]
        if part["photographs"]:
            rows[name] = f"{part['photographs']} of {part['groups']} groups: " + ", ".join(
                f"{grade} {count}" for grade, count in part["by_grade"].items()
            )
    for symptom, counts in spec.symptoms.items():
        rows[symptom] = ", ".join(
            f"{grade} {count}" for grade, count in zip(GRADE_NAMES, counts, strict=True)
        )
    show("prepare", rows | {"report": storage.join(out, REPORT_FILE)})
    for line in data_report.list_warnings(spec, summary):
        console.print(f"WARNING: {line}", style="bold red", markup=False, highlight=False)


def format_counts(counts: dict[str, int]) -> str:
    """Format counts by name, as `3 blurred, 1 empty`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _agreement(label_log: dict[str, Any] | None) -> dict[str, Any]:
    """Lines of the table with the readers of a label log and the agreement of each pair."""
    if label_log is None:
        return {}
    lines: dict[str, Any] = {
        "readers": {name: counts["answers"] for name, counts in label_log["readers"].items()}
    }
    for pair in label_log["agreement"]:
        lines[" and ".join(pair["readers"])] = str(data_report.agreement_words(pair))
    return lines
