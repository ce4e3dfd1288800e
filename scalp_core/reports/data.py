"""The report of `scalp prepare`, `report.html`: content of a source, dropped images, findings and splits.

It shows images and names microscopes, so it is only for people who may see the source; a pseudonymized export
does not contain it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from scalp_core.curation.findings import FINDINGS, REASONS
from scalp_core.curation.splits import MIN_GROUPS, parse_ratio
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import LEAKY, SPLITS, DataSpec, SplitSpec
from scalp_core.datasets.scan import OBJECT_CODES
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.grades import GRADE_NAMES
from scalp_core.images import codecs
from scalp_core.reports import page
from scalp_core.reports.page import Text, text

_THUMBNAIL = (176, 132)
_LONG = 16  # a table of more rows is folded

# A share of a split is far from the ratio when it differs by more than both.
_SHARE_POINTS, _SHARE_PART = 0.05, 0.25


def render_report(spec: DataSpec, summary: dict[str, Any], examples: dict[str, Any]) -> bytes:
    """Render the report as one HTML page.

    Args:
        spec: Content of `data.json`.
        summary: Summary of `scalp prepare`.
        examples: `sheets` (images by grade), `near_pairs` and `dropped_examples` from `audit`.
    """
    names = page.grade_texts()
    return page.render(
        "data.html",
        spec=spec,
        summary=summary,
        warnings=list_warnings(spec, summary),
        names=names,
        split_keys=[page.word("key", key) for key in spec.split.keys],
        placed=sum(part["photographs"] for part in summary["parts"].values()),
        parts=[(name, summary["parts"][name]) for name in SPLITS if summary["parts"][name]["photographs"]],
        sheets=[
            {
                "count": summary["by_grade"][GRADE_NAMES[grade]],
                "pictures": make_thumbnails(rows),
            }
            for grade, rows in examples["sheets"].items()
        ],
        near_pairs=[
            {
                "pictures": make_thumbnails(pair),
                "names": [text("none") if row["label"] is None else names[row["label"]] for row in pair],
                "differ": pair[0]["label"] != pair[1]["label"],
            }
            for pair in examples["near_pairs"]
        ],
        dropped_examples=examples["dropped_examples"],
        reasons=IMAGE_CODES | OBJECT_CODES | REASONS,
        findings=FINDINGS,
        long=_LONG,
        label_log=summary.get("label_log"),
        agreement_words=agreement_words,
        slice_name=slice_name,
    )


def slice_name(column: str, value: str | None) -> Text:
    """Name of a slice by position, sex, age, site or microscope; its code if it has no words."""
    if value is None:
        return text("unknown")
    if column == "age" and value.endswith("0s"):
        return text("{decade}s", decade=value.removesuffix("s"))
    return page.word(column, value)


def agreement_words(pair: dict[str, Any]) -> Text:
    """Agreement of two readers in words, from `labels.agreement.measure_agreement`."""
    if pair["qwk"] is None:
        return text("kappa undefined, {graded} images graded by both", graded=page.number(pair["graded"]))
    interval: Text | str = text("no interval")
    if pair["low"] is not None:
        interval = text("95 % {low} to {high}", low=f"{pair['low']:.2f}", high=f"{pair['high']:.2f}")
    return text(
        "kappa {qwk} ({interval}), the same grade for {equal} of {graded} images graded by both",
        qwk=f"{pair['qwk']:.2f}",
        interval=interval,
        equal=page.number(pair["equal"]),
        graded=page.number(pair["graded"]),
    )


def leak_warning(split: SplitSpec) -> Text | None:
    """`SplitSpec.warning` in both languages."""
    if not split.leaky:
        return None
    pairs = [
        text("{count} of one {key}", count=page.number(count), key=page.word("key", key))
        for key, count in split.leaking_pairs.items()
    ]
    return text(LEAKY, pairs=page.join(pairs))


def list_warnings(spec: DataSpec, summary: dict[str, Any]) -> list[Text]:
    """Warnings about data and splits, one line each."""
    n = page.number
    lines = [text(spec.warning)] if spec.warning else []
    if leak := leak_warning(spec.split):
        lines.append(leak)
    elif shared := {key: pairs for key, pairs in spec.split.leaking_pairs.items() if pairs}:
        pairs = page.join(
            text("{count} pairs of one {key}", count=n(count), key=page.word("key", key))
            for key, count in shared.items()
        )
        lines.append(
            text(
                "images in different splits share what --group or the delivery does not separate: {pairs}",
                pairs=pairs,
            )
        )
    alone = summary["grouped_by"].get("photograph", 0)
    if alone and spec.split.method in ("group", "official"):
        lines.append(
            text(
                "the names of {count} images have no device: images of one person may be in two splits, and "
                "test metrics are then too optimistic; give their groups in a CSV of uri,label,group",
                count=n(alone),
            )
        )
    if (label_log := summary.get("label_log")) and (saw := label_log["saw_model"]):
        lines.append(
            text(
                "{count} labels were given only by readers who saw the model's answer: an evaluation on them "
                "favors that model; leave them out with --blind-only",
                count=n(saw),
            )
        )
    if missing := summary["could_not_be_fetched"]:
        lines.append(
            text("{count} objects could not be fetched; --retry-failed reads them again", count=n(missing))
        )
    lines += _split_warnings(spec.split, summary)
    if count := summary["findings"]["joins_many_groups"]:
        lines.append(
            text(
                "{count} images are the same in so many groups that they join none; see joins_many_groups in "
                "findings.parquet",
                count=n(count),
            )
        )
    if crowded := summary["findings"]["crowded_hash"]:
        lines.append(
            text(
                "{count} images look like so many others that not all were compared: near-duplicates of them "
                "may be in two splits; see crowded_hash in findings.parquet",
                count=n(crowded),
            )
        )
    for name in SPLITS:
        part = summary["parts"][name]
        counts = zip(page.grade_texts(), part["by_grade"].values(), strict=True)
        empty = [grade for grade, count in counts if not count]
        if part["photographs"] and empty:
            split = page.word("split", name)
            lines.append(
                text("the {split} split has no image of grade {grades}", split=split, grades=page.join(empty))
            )
    return lines


def _split_warnings(spec: SplitSpec, summary: dict[str, Any]) -> list[Text]:
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
                text(
                    "the {split} split has {share} of the images instead of {target}; {cause}",
                    split=page.word("split", name),
                    share=f"{share:.1%}",
                    target=f"{target:.0%}",
                    cause=_cause(summary),
                )
            )
        if spec.method != "random" and part["groups"] < MIN_GROUPS:
            lines.append(
                text(
                    "the {split} split has {groups} group: its metrics are those of one microscope or "
                    "person; {cause}",
                    split=page.word("split", name),
                    groups=part["groups"],
                    cause=_cause(summary),
                )
            )
    return lines


def _cause(summary: dict[str, Any]) -> Text:
    """Name the largest group."""
    total = sum(part["photographs"] for part in summary["parts"].values())
    groups = sum(part["groups"] for part in summary["parts"].values())
    largest = summary["largest_groups"][0]
    return text(
        'of {groups} groups, <span class="name">{largest}</span> has {share} of the images',
        groups=page.number(groups),
        largest=largest["group"],
        share=f"{largest['photographs'] / total:.0%}",
    )


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
    return page.data_uri(buffer.getvalue(), "jpeg")
