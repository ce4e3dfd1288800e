"""The report of `scalp grade`, `report.html`: counts, drift, failures and the images to look at first.

The file is self-contained. Names of files are untrusted, so the page escapes them, and its content security
policy blocks scripts and requests as a second defense. It shows images: restrict access to it like theirs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from scalp_core.bundles.contract import BundleSpec
from scalp_core.errors import IMAGE_CODES
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.inference.decision import NOT_FINITE, REASONS
from scalp_core.results.drift import Counts, Drift, measure_drift

# Share of failures that suggests a fault of the source or of the access to it.
_MANY_FAILED = 0.05
_LEVELS = {"none": "none", "some": "▲ some", "strong": "▲▲ STRONG", "too_few": "too few"}
_OPTIONAL: dict[str, Any] = {
    "computed_by": "",
    "other_files": 0,
    "photographs_per_second": None,
    "machine_hours": None,
    "by_reason": {},
    "settings": {},
    "sessions": [],
    "inputs": None,
}


@dataclass(frozen=True)
class Card:
    """An image of the review queue; pictures are data URIs."""

    row: dict[str, Any]  # `location, grade, probabilities, unlikeness, refer_reasons` of the result row
    image: str | None = None  # image as the model saw it; None if it is no longer readable
    missing_reason: str = ""  # reason why the image is not readable
    heatmap: str | None = None  # image with its heatmap overlay; None without a heatmap


@dataclass(frozen=True)
class Pictures:
    """The review queue: `least_sure` and `most_unlike` images, the meaning of heatmaps, and notes on gaps."""

    least_sure: Sequence[Card] = ()
    most_unlike: Sequence[Card] = ()
    scale: str | None = None
    meaning: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


def render_report(
    spec: BundleSpec,
    summary: dict[str, Any],
    tables: dict[str, Any],
    pictures: Pictures,
    versions: dict[str, str],
) -> bytes:
    """Render the report as HTML.

    Args:
        spec: Contract of the bundle.
        summary: Summary of `scalp grade`.
        tables: `failures`, `mean_severity`, and the slices `folders` and `devices` (None where no name has a
            device) of `ResultRows`.
        pictures: Review queue.
        versions: Versions of the libraries.
    """
    summary = _OPTIONAL | summary
    text = resources.files("scalp_core.results").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["csp_hash"] = _csp_hash
    drift = summary_drift(summary, spec)
    page = environment.from_string(text).render(
        summary=summary,
        warnings=list_warnings(spec, summary, drift),
        grades=_grades(spec, summary, drift),
        drift=drift,
        statistics=sorted(drift.statistics or (), key=lambda statistic: -statistic.psi),
        levels=_LEVELS,
        pictures=pictures,
        least_sure=pictures.least_sure,
        most_unlike=pictures.most_unlike,
        reasons=REASONS,
        codes=IMAGE_CODES,
        versions=versions,
        **tables,
    )
    return page.encode()


def data_uri(data: bytes, kind: str) -> str:
    """Encode a picture as a data URI for `src`; `kind` is jpeg or png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def summary_drift(summary: dict[str, Any], spec: BundleSpec) -> Drift:
    """Measure the drift from the counts in a summary."""
    inputs = summary.get("inputs")
    return measure_drift(Counts.model_validate(inputs) if inputs else None, summary["by_grade"], spec)


def list_warnings(spec: BundleSpec, summary: dict[str, Any], drift: Drift) -> list[str]:
    """List the warnings about the results, one line each."""
    lines = [f"the model was {spec.warning}"] if spec.warning else []
    if missing := summary["rows_unaccounted"]:
        lines.append(
            f"{missing:,} of {summary['rows']:,} images are not accounted for exactly once; "
            "run the same command again"
        )
    if summary["failed"] > _MANY_FAILED * summary["rows"]:
        code, count = max(summary["by_error"].items(), key=lambda item: item[1])
        lines.append(
            f"{summary['failed'] / summary['rows']:.0%} of the images failed, most of them "
            f"({count:,}) because {IMAGE_CODES.get(code, code)}"
        )
    if count := summary["by_reason"].get(NOT_FINITE):
        lines.append(
            f"the scores of {count:,} images are not finite numbers, so their grades mean nothing; "
            "grade them again with --precision fp32, or on another machine"
        )
    if drift.flag:
        lines.append(drift.sentence)
    if spec.training.split is not None and spec.training.split.warning:
        lines.append(f"the model was trained on a {spec.training.split.warning}")
    return lines


def _grades(spec: BundleSpec, summary: dict[str, Any], drift: Drift) -> list[dict[str, Any]]:
    korean = GRADE_NAMES_KO if spec.grade_names == GRADE_NAMES else ("",) * len(spec.grade_names)
    return [
        {
            "name": name,
            "korean": other,
            "count": summary["by_grade"].get(name, 0),
            "share": drift.grades.shares[name],
            "share_at_training": drift.grades.shares_at_training[name],
        }
        for name, other in zip(spec.grade_names, korean, strict=True)
    ]


def _csp_hash(css: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
