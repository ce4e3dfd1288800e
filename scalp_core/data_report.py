"""`report.html` of `scalp prepare`: what a source holds, what was dropped and why, how it was divided.

One file that asks no other for anything. It shows photographs and names microscopes: it is for those who may
see the source, and is no part of a pseudonymised export.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from scalp_core import codecs, sources
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.inventory import OBJECT_CODES
from scalp_core.manifest import PARTS, DataSpec
from scalp_core.relations import FINDINGS, REASONS
from scalp_core.sources import Location

_THUMBNAIL = (176, 132)
_LONG = 16  # a table of more rows is folded


def html(spec: DataSpec, summary: dict[str, Any], examples: dict[str, Any]) -> bytes:
    """The report.

    Args:
        spec: the contract of the data.
        summary: that of `scalp prepare`.
        examples: `sheets` (grade to photographs), `near_pairs` and `dropped_examples`, as from `audit`.
    """
    text = resources.files("scalp_core").joinpath("data_report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(text).render(
        spec=spec,
        summary=summary,
        warnings=warnings(summary),
        grades=[f"{grade} {name}" for grade, name in enumerate(GRADE_NAMES)],
        parts=[(name, summary["parts"][name]) for name in PARTS if summary["parts"][name]["photographs"]],
        sheets=[_sheet(int(grade), rows, summary) for grade, rows in examples["sheets"].items()],
        near_pairs=[
            {"pictures": _thumbnails(pair), "labels": [row["label"] for row in pair]}
            for pair in examples["near_pairs"]
        ],
        dropped_examples=examples["dropped_examples"],
        reasons=IMAGE_CODES | OBJECT_CODES | REASONS,
        findings=FINDINGS,
        long=_LONG,
    )
    return page.encode()


def warnings(summary: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know, one line each."""
    spec, found = DataSpec.model_validate(_contract(summary)), []
    if spec.split.warning:
        found.append(spec.split.warning)
    elif shared := {key: pairs for key, pairs in spec.split.leaking_pairs.items() if pairs}:
        pairs = ", ".join(f"{count:,} pairs of one {key}" for key, count in shared.items())
        found.append(f"photographs in different parts share what --group or the delivery let them: {pairs}")
    alone = summary["grouped_by"].get("photograph", 0)
    if alone and spec.split.method in ("group", "official"):
        found.append(
            f"the names of {alone:,} photographs carry no device: pictures of one person may be in two "
            "parts, and the test figures flatter; give their groups in a CSV of uri,label,group"
        )
    if missing := summary["could_not_be_fetched"]:
        found.append(f"{missing:,} objects could not be fetched; --retry-failed reads them again")
    for name in PARTS:
        part = summary["parts"][name]
        empty = [grade for grade, count in part["by_grade"].items() if not count]
        if part["photographs"] and empty:
            found.append(f"the {name} part has no photograph of grade {', '.join(empty)}")
    return found


def _contract(summary: dict[str, Any]) -> dict[str, Any]:
    return {"created_at": summary["date"]} | {
        name: summary[name] for name in DataSpec.model_fields if name in summary
    }


def _sheet(grade: int, rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    name = GRADE_NAMES[grade]
    return {
        "grade": f"{grade} {name}",
        "korean": GRADE_NAMES_KO[grade],
        "count": summary["by_grade"][name],
        "pictures": _thumbnails(rows),
    }


def _thumbnails(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Small pictures as data URIs, without metadata; grey where one cannot be read any more."""
    locations = [Location(row["uri"], row["member"]) for row in rows]
    return [_thumbnail(data) for data in sources.read_photographs(locations, codecs.MAX_BYTES)]


def _thumbnail(data: bytes | ImageError) -> str:
    try:
        if isinstance(data, ImageError):
            raise data
        picture = Image.fromarray(codecs.read_picture(data, lambda _width, _height: _THUMBNAIL).pixels)
    except ImageError:
        picture = Image.fromarray(np.full((*_THUMBNAIL[::-1], 3), 128, np.uint8))
    picture.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
