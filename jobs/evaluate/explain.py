"""`scalp explain`: Grad-CAM heatmaps of the images of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs.common.console import SUMMARY_FILE, console, now, progress_bar, read_json, show, write_json
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import image_id, location_id
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import decode
from scalp_core.inference.decision import NOT_FINITE, Grading
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.heatmaps import Explainer
from scalp_core.inference.overlay import MEANING, overlay, png
from scalp_core.inference.predictor import Device, Predictor
from scalp_core.storage import outputs

KIND = "explain"
_IDENTITY_FILE = "run.json"
_CHUNK_SIZE = 16

# Layout of the picture, in pixels.
_MARGIN, _PANEL, _TEXT, _LINE, _LABEL_WIDTH = 12, 448, 17, 24, 84
_OPACITY = 0.6


def explain(
    bundle: str, source: str, out: str, grade: int | None = None, limit: int = 50, device: Device = "auto"
) -> dict[str, Any]:
    """Write a picture per image: the image as the model saw it, its heatmap overlay, and its grade.

    Args:
        bundle: Directory of the bundle, local or `s3://`.
        source: Folder, prefix, `.zip`, `.tar` or `.tar.gz`, local or `s3://`.
        out: Output directory for `<location id>.png` and `summary.json`, local or `s3://`.
        grade: Grade to explain; None: the predicted grade of each image.
        limit: Maximum number of images, spread evenly over the source.
        device: Device of the model: auto, cpu or cuda.

    Returns:
        The summary, with the file of each picture, or the reason why an image has none.

    Raises:
        UserError: Invalid input, an architecture without a feature map, or `out` overlaps with the source,
            holds other files, or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [source])
    loaded = load_bundle(bundle)
    predictor = Predictor(loaded, device)
    identity = {
        "model_version": predictor.model_version,
        "source": storage.absolute(source),
        "grade": grade,
        "limit": limit,
    }
    if summary := _finished(out, identity):
        return summary
    listed = datasets_locations.list_images(source).images
    explainer = make_explainer(loaded, device)
    count = min(limit, len(listed))
    chosen = [listed[index * len(listed) // count] for index in range(count)]
    rows: list[dict[str, Any]] = []
    with (
        outputs.open_output(out, KIND, [source]),
        progress_bar("explaining", len(chosen)) as (progress, task),
    ):
        write_json(storage.join(out, _IDENTITY_FILE), identity)
        for start in range(0, len(chosen), _CHUNK_SIZE):
            rows += _explain_chunk(chosen[start : start + _CHUNK_SIZE], predictor, explainer, grade, out)
            progress.update(task, completed=len(rows))
        summary = _summary(rows, len(listed), loaded, explainer, identity)
        write_json(storage.join(out, SUMMARY_FILE), summary)
    _show(summary, out)
    return summary


def _finished(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of an identical finished run; reject the output directory of another run."""
    known = read_json(storage.join(out, _IDENTITY_FILE)) or identity
    for name, value in identity.items():
        if known.get(name) != value:
            raise UserError(
                f"{out} holds pictures of {name} {known.get(name)}, not {value}; choose another OUT"
            )
    summary = read_json(storage.join(out, SUMMARY_FILE))
    if summary:
        console.print(f"{out} is finished and has {summary['explained']} pictures")
    return summary


def _explain_chunk(
    locations: list[Location], predictor: Predictor, explainer: Explainer, grade: int | None, out: str
) -> list[dict[str, Any]]:
    """Write the pictures of some images; return a row per image, with the picture's name or an error."""
    data = list(datasets_locations.read_images(locations, MAX_BYTES))
    decoded = [_decode(content, predictor) for content in data]
    images = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
    size = predictor.spec.preprocess.size
    stacked = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
    answers = predictor.grade(stacked)
    # Explains the predicted grade, which in bf16 may differ from that of the weights in fp32.
    grades = [answer.grade if grade is None else grade for answer in answers]
    explained_images = zip(stacked, answers, explainer.heatmaps(stacked, grades), grades, strict=True)
    rows = []
    for location, file, result in zip(locations, data, decoded, strict=True):
        row: dict[str, Any] = {
            "image_id": None if isinstance(file, ImageError) else image_id(sha256(file).hexdigest()),
            "location_id": location_id(location),
            "uri": location.uri,
            "member": location.member,
        }
        if isinstance(result, ImageError):
            rows.append(row | {"status": "failed", "error_code": result.code, "error": result.message})
            continue
        pixels, answer, heat, explained = next(explained_images)
        name = f"{row['location_id']}.png"
        storage.write(
            storage.join(out, name),
            png(draw_picture(pixels, heat, answer, explained, predictor.spec.grade_names)),
        )
        row |= {"status": "explained", "picture": name, "explained_grade": explained}
        rows.append(row | {"has_heat": bool(heat.any())} | vars(answer))
    return rows


def _decode(data: bytes | ImageError, predictor: Predictor) -> np.ndarray | ImageError:
    if isinstance(data, ImageError):
        return data
    try:
        return decode(data, predictor.spec.preprocess).pixels
    except ImageError as error:
        return error


def draw_picture(
    pixels: np.ndarray, heat: np.ndarray, answer: Grading, explained: int, names: Sequence[str]
) -> np.ndarray:
    """Draw an image next to its heatmap overlay, with a caption but no file name, which may name a person.

    Args:
        pixels: uint8 (S, S, 3).
        heat: float (S, S) in 0..1.
        answer: Grading of the image.
        explained: Grade that the heatmap explains.
        names: Names of the grades.
    """
    width, height = 3 * _MARGIN + 2 * _PANEL, 3 * _MARGIN + _PANEL + 3 * _LINE
    sheet = Image.new("RGB", (width, height), "white")
    left, right, below = _MARGIN, 2 * _MARGIN + _PANEL, 2 * _MARGIN + _PANEL
    _paste(sheet, pixels, (left, _MARGIN, _PANEL, _PANEL))
    _paste(sheet, overlay(pixels, heat, _OPACITY), (right, _MARGIN, _PANEL, _PANEL))
    probabilities = "   ".join(
        f"{name} {value:.0%}" for name, value in zip(names, answer.probabilities, strict=True)
    )
    if NOT_FINITE in answer.refer_reasons:
        _write(sheet, (left, below), "Not graded: the model's scores are not finite")
    else:
        _write(sheet, (left, below), f"Graded {answer.grade} {answer.grade_name}", probabilities)
    grade = f"{explained} {names[explained]}"
    if heat.any():
        _write(sheet, (right, below), f"Evidence for {grade}", "", MEANING.capitalize())
        _draw_scale(sheet, right, below)
    else:
        _write(sheet, (right, below), f"No evidence for {grade}: no heat", "", MEANING.capitalize())
    return np.asarray(sheet)


def _paste(sheet: Image.Image, pixels: np.ndarray, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), (left, top))


def _write(sheet: Image.Image, at: tuple[int, int], *lines: str) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_TEXT)
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _LINE), line, "#1a1a1a", font)


def _draw_scale(sheet: Image.Image, left: int, top: int) -> None:
    """Draw the color scale over gray, with labels at its ends."""
    ramp = np.tile(np.linspace(0, 1, 256), (_TEXT, 1))
    colors = overlay(np.full((_TEXT, 256, 3), 150, np.uint8), ramp, _OPACITY)
    top += _LINE
    _write(sheet, (left, top), "not at all")
    _write(sheet, (left + _PANEL - _LABEL_WIDTH + 10, top), "most")
    _paste(sheet, colors, (left + _LABEL_WIDTH, top + 3, _PANEL - 2 * _LABEL_WIDTH, _TEXT))


def _summary(
    rows: list[dict[str, Any]], listed: int, bundle: Bundle, explainer: Explainer, identity: dict[str, Any]
) -> dict[str, Any]:
    spec = bundle.spec
    explained = [row for row in rows if row["status"] == "explained"]
    grades = Counter(row["grade_name"] for row in explained)
    errors = Counter(row["error_code"] for row in rows if row["status"] == "failed")
    return {
        "kind": "explain",
        "date": now(),
        **identity,
        "meaning": MEANING,
        "method": f"Grad-CAM of the last map, {explainer.cells[0]} by {explainer.cells[1]} cells, by the "
        "weights in fp32; 1 is the maximum of each image",
        "photographs_in_source": listed,
        "photographs": len(rows),
        "explained": len(explained),
        "without_heat": sum(not row["has_heat"] for row in explained),
        "not_finite": sum(NOT_FINITE in row["refer_reasons"] for row in explained),
        "failed": len(rows) - len(explained),
        "by_grade": {name: grades[name] for name in spec.grade_names},
        "by_error": dict(errors.most_common()),
        "rows": rows,
    }


def _show(summary: dict[str, Any], out: str) -> None:
    rows = {"images": f"{summary['photographs']} of {summary['photographs_in_source']}"}
    rows |= {name: summary[name] for name in ("explained", "without_heat", "failed", "by_error", "by_grade")}
    show("explain", rows | {"heat shows": MEANING, "pictures": out})
