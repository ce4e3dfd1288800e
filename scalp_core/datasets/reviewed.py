"""Read a label log of `scalp review` as a source of labeled images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from scalp_core.datasets.manifest import likeliest_grade
from scalp_core.labels.agreement import measure_agreement
from scalp_core.labels.decisions import LEFT_OUT, Answers
from scalp_core.labels.log import Label, hash_labels

ALREADY_IN_DATA = "already_in_data"


def read_rows(answers: Answers, known: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield one row of `scan.LISTED` per image: with its grade, or the code why it has none.

    Args:
        answers: Answers of the log.
        known: sha256 of the images that the data has already; their answers are left out.
    """
    for label, code, _, detail, soft in answers.decisions():
        if label.sha256 in known:
            code, detail, soft = ALREADY_IN_DATA, "its label there counts", None
        grade = likeliest_grade(soft) if soft else label.grade
        yield {
            "uri": label.uri,
            "member": label.member,
            "bytes": None,
            "code": code,
            "error": detail or LEFT_OUT[code] if code else None,
            "kind": "photograph",
            "label": grade if code is None else None,
            "soft_label": soft,
            "group": label.group,
            "sha256": label.sha256,  # a file that has changed since its review is refused
        }


def summarize(labels: Iterable[Label], answers: Answers) -> dict[str, Any]:
    """Counts of a label log, its hash and the agreement of its readers, for `summary.json` and the report."""
    labels = list(labels)
    log = {"answers": len(labels), "sha256": hash_labels(labels)}
    return log | answers.count() | {"agreement": measure_agreement(answers)}
