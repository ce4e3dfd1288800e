"""`scalp prepare`: a source of labelled photographs to a manifest whose parts do not leak."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from jobs.console import SUMMARY_FILE, console, now, progress_bar, show, write_json
from scalp_core import aihub, codecs, manifest, preprocess, report, storage
from scalp_core.errors import ImageError, UserError
from scalp_core.grades import GRADE_NAMES, SYMPTOMS
from scalp_core.manifest import PARTS
from scalp_core.split import parse_ratio, split_by_group
from scalp_core.storage import Location

_SHEET_COLUMNS = 6


def prepare(
    source: str, out: str, symptom: str = SYMPTOMS[0], ratio: str = "7:2:1", seed: int = 0
) -> dict[str, Any]:
    """Reads, deduplicates and splits.

    Args:
        source: folder or prefix in the AI Hub layout, or of class folders.
        out: directory for `manifest.parquet`, `summary.json` and `contact_sheet.png`.
        symptom: of the AI Hub folders.
        ratio: TRAIN:VAL:TEST.
        seed: of the split.

    Returns:
        the summary.
    """
    out, shares = storage.absolute(out), parse_ratio(ratio)
    if symptom not in SYMPTOMS:
        raise UserError(f"--symptom {symptom}: give one of {', '.join(SYMPTOMS)}")
    with progress_bar("reading", None) as (progress, task):
        reading = aihub.read_source(
            source, symptom, lambda done, total: progress.update(task, completed=done, total=total)
        )
    labels = np.array([row["label"] for row in reading.rows])
    groups = np.array([row["group"] for row in reading.rows])
    for row, name in zip(reading.rows, split_by_group(labels, groups, shares, seed), strict=True):
        row["split"] = name
    table = manifest.write_manifest(out, reading.rows)
    manifest.check_parts(table)
    storage.write(storage.join(out, "contact_sheet.png"), _contact_sheet(reading.rows))
    summary = _summary(source, symptom, ratio, seed, reading)
    write_json(storage.join(out, SUMMARY_FILE), summary)
    _show(summary, out)
    return summary


def _contact_sheet(rows: list[dict[str, Any]]) -> bytes:
    """A few photographs of each grade, spread over the devices, as the model sees them."""
    spec = preprocess.Preprocess(size=224)
    images = []
    for grade in range(len(GRADE_NAMES)):
        found = [Location(row["uri"], row["member"]) for row in rows if row["label"] == grade]
        chosen = found[:: max(1, len(found) // _SHEET_COLUMNS)][:_SHEET_COLUMNS]
        images.append([_thumbnail(location, spec) for location in chosen])
    return report.contact_sheet(images, "photographs by grade, as the model sees them")


def _thumbnail(location: Location, spec: preprocess.Preprocess) -> np.ndarray:
    """A photograph as the model sees it; grey when its header was sound and its pixels are not."""
    (data,) = storage.read_photographs([location], codecs.MAX_BYTES)
    try:
        if isinstance(data, ImageError):
            raise data
        return preprocess.decode(data, spec).pixels
    except ImageError:
        return np.full((spec.size, spec.size, 3), 128, np.uint8)


def _summary(source: str, symptom: str, ratio: str, seed: int, reading: aihub.Reading) -> dict[str, Any]:
    parts = {}
    for name in PARTS:
        rows = [row for row in reading.rows if row["split"] == name]
        grades = Counter(row["label"] for row in rows)
        parts[name] = {
            "photographs": len(rows),
            "groups": len({row["group"] for row in rows}),
            "by_grade": {grade: grades[index] for index, grade in enumerate(GRADE_NAMES)},
        }
    return {
        "kind": "prepare",
        "date": now(),
        "source": storage.absolute(source),
        "layout": reading.layout,
        "symptom": symptom,
        "split": ratio,
        "seed": seed,
        "grouped_by": reading.grouped_by,
        "photographs": len(reading.rows),
        "dropped": {reason: count for reason, count in reading.dropped.items() if count},
        "parts": parts,
    }


def _show(summary: dict[str, Any], out: str) -> None:
    if summary["grouped_by"] == "photograph":
        console.print(
            "the file names carry no device: split by photograph, so pictures of one person may be on "
            "both sides and the test figures flatter"
        )
    rows: dict[str, Any] = {"photographs": summary["photographs"], "left out": summary["dropped"]}
    for name, part in summary["parts"].items():
        rows[name] = f"{part['photographs']} of {part['groups']} groups: " + ", ".join(
            f"{grade} {count}" for grade, count in part["by_grade"].items()
        )
    show("prepare", rows | {"manifest": storage.join(out, manifest.MANIFEST_FILE)})
