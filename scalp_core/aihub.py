"""Reads AI Hub set 216 as it is delivered, and plain class folders, into manifest rows.

Layout: `Training|Validation/[원천]미세각질_2.중등도/STEM.jpg`, the label of each in
`[라벨]미세각질_2.중등도/STEM.json`, and `Meta/STEM_META.json`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from scalp_core import codecs, storage
from scalp_core.errors import ImageError, UserError
from scalp_core.grades import SYMPTOMS, parse_grade
from scalp_core.storage import Location

_CLASS_FOLDER = re.compile(
    r"^(?:\[(?P<kind>원천|라벨)\])?\s*(?P<symptom>" + "|".join(SYMPTOMS) + r")_(?P<grade>\d\..+)$"
)
# 0013_A2LEBJJDE00060O_1602578303771_3_TH: site, microscope, epoch in ms, shot, position on the head.
_STEM = re.compile(
    r"^(?P<site>\d{4})_(?P<device>[A-Z0-9]+)_(?P<epoch>\d{13})_(?P<shot>\d+)_(?P<pos>TH|LH|RH|BH)$"
)

_THREADS = 8


@dataclass
class Reading:
    """What was read from a source, and every file that was left out, by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    layout: str = ""
    grouped_by: str = ""


def read_source(source: str, symptom: str, on_progress: Callable[[int, int], None] | None = None) -> Reading:
    """Reads every photograph below `source`, deduplicated by content.

    Args:
        source: folder or prefix in the AI Hub layout, or with one folder for each grade (`0`..`3`, `mild`,
            `2.중등도`, …).
        symptom: which of `grades.SYMPTOMS` the AI Hub folders are read for.
        on_progress: called with photographs read and photographs in all.

    Raises:
        UserError: the source is missing or has neither layout.
    """
    source = storage.absolute(source)
    files = storage.list_files(source)
    images = [uri for uri in files if uri.lower().endswith(storage.IMAGE_SUFFIXES)]
    labelled = [(uri, label) for uri in images if (label := _aihub_grade(uri, symptom)) is not None]
    reading = Reading(layout="aihub")
    if not labelled:
        reading.layout = "class_folders"
        labelled = [(uri, label) for uri in images if (label := parse_grade(_folder(uri))) is not None]
    if not labelled:
        raise UserError(
            f"{source} holds neither AI Hub folders ([원천]{symptom}_0.양호 …) nor class folders "
            "(0 1 2 3, or good mild moderate severe) with photographs; check the path"
        )
    reading.dropped["not_in_a_grade_folder"] = len(images) - len(labelled)
    jsons = {_stem(uri): uri for uri in files if uri.endswith(".json") and not uri.endswith("_META.json")}
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda item: _read_row(item[0], item[1], jsons), labelled)
        rows = list(_counted(results, len(labelled), reading, on_progress))
    reading.rows = _deduplicate(rows, reading)
    _group(reading)
    return reading


def _counted(
    results: Iterator[dict[str, Any] | ImageError],
    total: int,
    reading: Reading,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Any]]:
    for done, result in enumerate(results, 1):
        if isinstance(result, ImageError):
            reading.dropped[result.code] += 1
        else:
            yield result
        if on_progress:
            on_progress(done, total)


def _folder(uri: str) -> str:
    return unicodedata.normalize("NFC", uri.rsplit("/", 2)[-2])


def _stem(uri: str) -> str:
    return uri.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _aihub_grade(uri: str, symptom: str) -> int | None:
    match = _CLASS_FOLDER.match(_folder(uri))
    if not match or match["kind"] == "라벨" or match["symptom"] != symptom:
        return None
    return parse_grade(match["grade"])


def _read_row(uri: str, label: int, jsons: dict[str, str]) -> dict[str, Any] | ImageError:
    (data,) = storage.read_photographs([Location(uri)], codecs.MAX_BYTES)
    if isinstance(data, ImageError):
        return data
    try:
        width, height = codecs.picture_size(data)
    except ImageError as error:
        return error
    stem = _stem(uri)
    row = {
        "uri": uri,
        "member": None,
        "sha256": sha256(data).hexdigest(),
        "width": width,
        "height": height,
        "label": int(label),
        "labels": _symptoms(jsons[stem]) if stem in jsons else None,
        "source_note": next((part for part in ("Training", "Validation") if f"/{part}/" in uri), None),
    }
    return row | _from_name(stem)


def _symptoms(uri: str) -> list[int] | None:
    """The six values of a label file; None when it does not hold six grades."""
    try:
        label = json.loads(storage.read(uri).decode("utf-8-sig"))
        values = [int(label[f"value_{number}"]) for number in range(1, len(SYMPTOMS) + 1)]
    except (ValueError, KeyError, TypeError):
        return None
    return values if all(0 <= value <= 3 for value in values) else None


def _from_name(stem: str) -> dict[str, Any]:
    match = _STEM.match(stem)
    if not match:
        return {"site": None, "device": None, "captured_at": None, "position": None}
    return {
        "site": match["site"],
        "device": match["device"],
        "captured_at": datetime.fromtimestamp(int(match["epoch"]) / 1000, UTC),
        "position": match["pos"],
    }


def _deduplicate(rows: list[dict[str, Any]], reading: Reading) -> list[dict[str, Any]]:
    """One row for each content; a content under two grades teaches nothing true and is left out whole."""
    by_content: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_content.setdefault(row["sha256"], []).append(row)
    kept = []
    for same in by_content.values():
        if len({row["label"] for row in same}) > 1:
            reading.dropped["conflicting_labels"] += len(same)
        else:
            reading.dropped["duplicate_content"] += len(same) - 1
            kept.append(same[0])
    return kept


def _group(reading: Reading) -> None:
    """Names each row's group: site and microscope, which no person crosses; else the photograph itself."""
    named = all(row["device"] for row in reading.rows)
    reading.grouped_by = "site_device" if named else "photograph"
    for row in reading.rows:
        row["image_id"] = row["sha256"][:20]
        row["group"] = f"{row['site']}_{row['device']}" if named else row["image_id"]
