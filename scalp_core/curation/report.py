"""Render `report.html` of `scalp prepare`: content of a source, dropped images, findings and splits.

The page is self-contained. It shows images and names microscopes, so it is only for people who may see the
source; a pseudonymized export does not contain it.
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

from scalp_core.curation.findings import FINDINGS, REASONS
from scalp_core.curation.splits import MIN_GROUPS, parse_ratio
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import SPLITS, DataSpec, SplitSpec
from scalp_core.datasets.scan import OBJECT_CODES
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.images import codecs

_THUMBNAIL = (176, 132)
_LONG = 16  # a table of more rows is folded

# A share of a split is far from the ratio when it differs by more than both.
_SHARE_POINTS, _SHARE_PART = 0.05, 0.25


def render_html(spec: DataSpec, summary: dict[str, Any], examples: dict[str, Any]) -> bytes:
    """Render the report as one HTML page.

    Args:
        spec: Content of `data.json`.
        summary: Summary of `scalp prepare`.
        examples: `sheets` (images by grade), `near_pairs` and `dropped_examples` from `audit`.
    """
    text = resources.files("scalp_core.curation").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(text).render(
        spec=spec,
        summary=summary,
        warnings=warnings(spec, summary),
        grades=[f"{grade} {name}" for grade, name in enumerate(GRADE_NAMES)],
        placed=sum(part["photographs"] for part in summary["parts"].values()),
        parts=[(name, summary["parts"][name]) for name in SPLITS if summary["parts"][name]["photographs"]],
        sheets=[
            {
                "grade": f"{grade} {GRADE_NAMES[grade]}",
                "korean": GRADE_NAMES_KO[grade],
                "count": summary["by_grade"][GRADE_NAMES[grade]],
                "pictures": make_thumbnails(rows),
            }
            for grade, rows in examples["sheets"].items()
        ],
        near_pairs=[
            {"pictures": make_thumbnails(pair), "labels": [row["label"] for row in pair]}
            for pair in examples["near_pairs"]
        ],
        dropped_examples=examples["dropped_examples"],
        reasons=IMAGE_CODES | OBJECT_CODES | REASONS,
        findings=FINDINGS,
        long=_LONG,
        label_log=summary.get("label_log"),
        agreement_words=agreement_words,
    )
    return page.encode()


def agreement_words(pair: dict[str, Any]) -> str:
    """Agreement of two readers in words, from `labels.agreement.measure_agreement`."""
    if pair["qwk"] is None:
        return f"kappa undefined, {pair['graded']:,} images graded by both"
    interval = "no interval" if pair["low"] is None else f"95 % {pair['low']:.2f} to {pair['high']:.2f}"
    return (
        f"kappa {pair['qwk']:.2f} ({interval}), the same grade for {pair['equal']:,} of {pair['graded']:,} "
        "images graded by both"
    )


def warnings(spec: DataSpec, summary: dict[str, Any]) -> list[str]:
    """Warnings about data and splits, one line each."""
    lines = [spec.warning] if spec.warning else []
    if spec.split.warning:
        lines.append(spec.split.warning)
    elif shared := {key: pairs for key, pairs in spec.split.leaking_pairs.items() if pairs}:
        pairs = ", ".join(f"{count:,} pairs of one {key}" for key, count in shared.items())
        lines.append(
            f"images in different splits share what --group or the delivery does not separate: {pairs}"
        )
    alone = summary["grouped_by"].get("photograph", 0)
    if alone and spec.split.method in ("group", "official"):
        lines.append(
            f"the names of {alone:,} images have no device: images of one person may be in two splits, and "
            "test metrics are then too optimistic; give their groups in a CSV of uri,label,group"
        )
    if (label_log := summary.get("label_log")) and (saw := label_log["saw_model"]):
        lines.append(
            f"{saw:,} labels were given only by readers who saw the model's answer: an evaluation on them "
            "favors that model; leave them out with --blind-only"
        )
    if missing := summary["could_not_be_fetched"]:
        lines.append(f"{missing:,} objects could not be fetched; --retry-failed reads them again")
    lines += _split_warnings(spec.split, summary)
    if count := summary["findings"]["joins_many_groups"]:
        lines.append(
            f"{count:,} images are the same in so many groups that they join none; see joins_many_groups in "
            "findings.parquet"
        )
    if crowded := summary["findings"]["crowded_hash"]:
        lines.append(
            f"{crowded:,} images look like so many others that not all were compared: near-duplicates of "
            "them may be in two splits; see crowded_hash in findings.parquet"
        )
    for name in SPLITS:
        part = summary["parts"][name]
        empty = [grade for grade, count in part["by_grade"].items() if not count]
        if part["photographs"] and empty:
            lines.append(f"the {name} split has no image of grade {', '.join(empty)}")
    return lines


def _split_warnings(spec: SplitSpec, summary: dict[str, Any]) -> list[str]:
    """Warnings about shares that are far from the ratio, and splits of too few groups, with their causes."""
    lines = []
    parts = summary["parts"]
    total = sum(part["photographs"] for part in parts.values())
    if not total or spec.method == "none":
        return []
    ratio = dict(zip(SPLITS, parse_ratio(spec.ratio), strict=True))
    for name, part in parts.items():
        target, share = ratio[name] / sum(ratio.values()), part["photographs"] / total
        if spec.method != "official" and abs(share - target) > max(_SHARE_POINTS, target * _SHARE_PART):
            lines.append(
                f"the {name} split has {share:.1%} of the images instead of {target:.0%}{_cause(summary)}"
            )
        if spec.method != "random" and part["groups"] < MIN_GROUPS:
            lines.append(
                f"the {name} split has {part['groups']} group: its metrics are those of one microscope or "
                f"person{_cause(summary)}"
            )
    return lines


def _cause(summary: dict[str, Any]) -> str:
    """Name the largest group."""
    total = sum(part["photographs"] for part in summary["parts"].values())
    groups = sum(part["groups"] for part in summary["parts"].values())
    largest = summary["largest_groups"][0]
    share = largest["photographs"] / total
    return f"; of {groups:,} groups, {largest['group']} has {share:.0%} of the images"


def make_thumbnails(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Thumbnails as data URIs, without metadata; gray for an image that can no longer be read."""
    locations = [Location(row["uri"], row["member"]) for row in rows]
    return [_thumbnail(data) for data in datasets_locations.read_images(locations, codecs.MAX_BYTES)]


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
