"""Write `report.html` of `scalp grade`: query the rows, read the least certain images, draw heatmaps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from jobs.common import provenance
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.inference import overlay
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.heatmaps import Explainer
from scalp_core.reports.grading import Card, Pictures, render_report
from scalp_core.reports.page import data_uri, number, text
from scalp_core.results.progress import REPORT_FILE
from scalp_core.results.query import ResultRows

QUEUE = 24
"""Maximum number of images in the review queue."""

_UNLIKE = 8  # of these, images least like the training split
_GROUPS = 20
_EXAMPLES = 3
_QUALITY = 82
_OPACITY = 0.6


def write_report(out: str, summary: dict[str, Any], bundle: Bundle, heatmaps: int = QUEUE) -> None:
    """Write `out/report.html` from the rows and the summary, in memory independent of their number.

    An image that cannot be read any more, or a heatmap that fails, is a note in the report. At most
    `heatmaps` are made, on CPUs; 0 loads no model.

    Raises:
        UserError: The rows do not exist, or cannot be read.
    """
    out = storage.absolute(out)
    with ResultRows(out) as graded:
        names = bundle.spec.grade_names
        devices = graded.slices("device", names, _GROUPS)
        tables = {
            "failures": graded.failures(_EXAMPLES),
            "folders": graded.slices("top", names, _GROUPS),
            "devices": devices if any(row["value"] for row in devices["rows"]) else None,
            "mean_severity": graded.totals()["mean_severity"],
            "other_symptoms": graded.count_other_symptoms(bundle.spec.graded_others),
        }
        unlike = graded.most_unlike(_UNLIKE)
        shown = {row["location_id"] for row in unlike}
        unsure = [row for row in graded.least_sure(QUEUE) if row["location_id"] not in shown]
    pictures = _pictures(unsure[: QUEUE - len(unlike)], unlike, bundle, heatmaps)
    page = render_report(bundle.spec, summary, tables, pictures, provenance.versions())
    storage.write(storage.join(out, REPORT_FILE), page)


def _pictures(
    unsure: list[dict[str, Any]], unlike: list[dict[str, Any]], bundle: Bundle, heatmaps: int
) -> Pictures:
    cards, pixels = _read(unsure + unlike, bundle.spec.preprocess)
    chosen = sorted(pixels)[:heatmaps]
    lost = len(cards) - len(pixels)
    notes = [text("{count} of them cannot be read any more.", count=number(lost))] if lost else []
    scale = None
    if chosen:
        try:
            heats = _draw_heatmaps(
                make_explainer(bundle, "cpu"), [(pixels[index], cards[index].row) for index in chosen]
            )
            for index, picture in zip(chosen, heats, strict=True):
                cards[index] = replace(cards[index], heatmap=picture)
            scale = _scale()
        except Exception as error:  # a finished run gets its report whatever fails here
            reason = (str(error) or repr(error)).splitlines()[0]
            notes.append(text('Heatmaps are missing: <span class="path">{reason}</span>.', reason=reason))
    elif not heatmaps:
        notes.append(text("Heatmaps were turned off."))
    return Pictures(cards[: len(unsure)], cards[len(unsure) :], scale, notes)


def _read(rows: list[dict[str, Any]], spec: Preprocess) -> tuple[list[Card], dict[int, np.ndarray]]:
    """Cards of the rows, and pixels, by index, of readable images; archives are read in their order."""
    cards, pixels = [Card(row) for row in rows], {}
    order = sorted(range(len(rows)), key=lambda index: (rows[index]["uri"], rows[index]["member"] or ""))
    locations = [Location(rows[index]["uri"], rows[index]["member"]) for index in order]
    for index, data in zip(order, datasets_locations.read_images(locations, MAX_BYTES), strict=True):
        try:
            if isinstance(data, ImageError):
                raise data
            pixels[index] = decode(data, spec).pixels
            cards[index] = replace(cards[index], image=_jpeg(pixels[index]))
        except ImageError as error:
            reason = text("it cannot be read any more: {reason}", reason=text(IMAGE_CODES[error.code]))
            cards[index] = replace(cards[index], missing_reason=reason)
    return cards, pixels


def _draw_heatmaps(explainer: Explainer, chosen: Sequence[tuple[np.ndarray, dict[str, Any]]]) -> list[str]:
    images = np.stack([pixels for pixels, _ in chosen])
    maps = explainer.heatmaps(images, [row["grade"] for _, row in chosen])
    return [_jpeg(overlay.overlay(image, heat, _OPACITY)) for image, heat in zip(images, maps, strict=True)]


def _scale() -> str:
    """Color scale of the heatmaps as a data URI, from the least to the most heat, over gray."""
    ramp = np.tile(np.linspace(0, 1, 128), (8, 1))
    return data_uri(overlay.png(overlay.overlay(np.full((8, 128, 3), 150, np.uint8), ramp, _OPACITY)), "png")


def _jpeg(pixels: np.ndarray) -> str:
    """JPEG data URI of the pixels, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return data_uri(buffer.getvalue(), "jpeg")
