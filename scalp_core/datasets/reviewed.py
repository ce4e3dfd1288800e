"""Read a label log of `scalp review` as a source of labeled images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scalp_core.labels.agreement import measure_agreement
from scalp_core.labels.decisions import LEFT_OUT, Answers


def read_rows(answers: Answers) -> Iterator[dict[str, Any]]:
    """Yield one row of `scan.LISTED` per image: with its grade, or the code of `LEFT_OUT` why it has none."""
    for label, code, _, detail in answers.decisions():
        yield {
            "uri": label.uri,
            "member": label.member,
            "bytes": None,
            "code": code,
            "error": detail or LEFT_OUT[code] if code else None,
            "kind": "photograph",
            "label": label.grade if code is None else None,
            "group": label.group,
            "sha256": label.sha256,  # a file that has changed since its review is refused
        }


def summarize(answers: Answers) -> dict[str, Any]:
    """Counts of a label log and the agreement of its readers, for `summary.json` and the report."""
    return answers.count() | {"agreement": measure_agreement(answers)}
