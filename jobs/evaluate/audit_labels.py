"""`scalp audit-labels`: list the labels that are most likely wrong, with their images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from jobs.common.console import SUMMARY_FILE, console, now, read_json, show, write_json
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.evaluation.label_errors import (
    AUDIT_KIND,
    OUT_OF_FOLD_FILE,
    SUSPECTS_FILE,
    find_label_errors,
)
from scalp_core.grades import GRADE_NAMES, SYMPTOM_IDS
from scalp_core.reports import page
from scalp_core.reports.data import make_thumbnails
from scalp_core.storage import outputs, parquet

_COLUMNS = ("image_id", "sha256", "uri", "member", "label", "group", "probabilities")


def audit_labels(run: str, out: str, pictures: int = 100) -> dict[str, Any]:
    """List the labels that are most likely wrong, by confident learning on out-of-fold probabilities.

    Args:
        run: Directory that `scalp train --folds` wrote.
        out: Output directory for `suspects.parquet`, `report.html` and `summary.json`.
        pictures: Maximum number of images in the report, the likeliest errors first.

    Returns:
        The summary: number of images and suspect labels, and the counts by label and suggested grade.

    Raises:
        UserError: `run` has no out-of-fold answers, or `out` holds other files or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, AUDIT_KIND, [run])
    answers = storage.join(storage.absolute(run), OUT_OF_FOLD_FILE)
    if not storage.exists(answers):
        raise UserError(f"{run} has no {OUT_OF_FOLD_FILE}; make it with scalp train DATA RUN --folds 5")
    rows = parquet.read(answers)
    labels = np.array(rows["label"].to_pylist())
    order, suggested, margins = find_label_errors(labels, np.array(rows["probabilities"].to_pylist()))
    # Answers of older versions have no sha256, so `scalp review` cannot open their suspects.
    suspects = rows.take(order).select([name for name in _COLUMNS if name in rows.column_names])
    suspects = suspects.append_column("suggested", pa.array(suggested, pa.int8()))
    suspects = suspects.append_column("margin", pa.array(margins, pa.float64()))
    of_run = read_json(storage.join(storage.absolute(run), SUMMARY_FILE)) or {}
    with outputs.open_output(out, AUDIT_KIND, [run]):
        counts = np.zeros((len(GRADE_NAMES), len(GRADE_NAMES)), int)
        np.add.at(counts, (labels[order], suggested), 1)
        summary = {
            "kind": AUDIT_KIND,
            "date": now(),
            "data_sha256": of_run.get("data_sha256"),
            "symptom": of_run.get("symptom", SYMPTOM_IDS[0]),
            "model_version": f"folds of {of_run.get('student', {}).get('model_version', run)}",
            "synthetic": of_run.get("synthetic"),
            "images": len(labels),
            "suspects": len(order),
            "by_label_and_suggestion": counts.tolist(),
        }
        parquet.write(storage.join(out, SUSPECTS_FILE), suspects)
        with console.status("reading the images of the report"):
            page = _render(summary, suspects.slice(0, pictures).to_pylist())
        storage.write(storage.join(out, "report.html"), page)
        write_json(storage.join(out, SUMMARY_FILE), summary)
    show(
        AUDIT_KIND,
        {
            "images": f"{len(labels):,}",
            "suspect labels": f"{len(order):,} ({len(order) / len(labels):.1%}), the likeliest errors first",
            "list": storage.join(out, SUSPECTS_FILE),
            "images to look at": storage.join(out, "report.html"),
            "to review them": f"scalp review {out} LABELS --reader NAME",
        },
    )
    return summary


def _render(summary: dict[str, Any], suspects: list[dict[str, Any]]) -> bytes:
    return page.render(
        "label_errors.html",
        summary=summary,
        suspects=list(zip(suspects, make_thumbnails(suspects), strict=True)),
        names=page.grade_texts(),
    )
