"""The report of `scalp grade`, `report.html`: counts, drift, failures and the images to look at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scalp_core.bundles.contract import BundleSpec
from scalp_core.errors import IMAGE_CODES
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.inference.decision import NOT_FINITE, REASONS
from scalp_core.reports import page
from scalp_core.reports.data import leak_warning
from scalp_core.reports.page import Text, text
from scalp_core.results.drift import GRADE_MIX, MIN_PHOTOGRAPHS, Counts, Drift, list_drifting, measure_drift

_NAMED = 4  # statistics named in the warning of a drift
# Share of failures that suggests a fault of the source or of the access to it.
_MANY_FAILED = 0.05
_LEVELS = {"none": "none", "some": "▲ some", "strong": "▲▲ STRONG", "too_few": "too few"}
_DRIFTS = {
    "none": "no drift: all compared values are like the training split",
    "some": "some drift: a difference from the training split in {names}",
    "strong": "DRIFT: a strong difference from the training split in {names}; look at some images before "
    "trusting the grades",
    "too_few": "too few images, here or in training, to detect drift; {least} are needed",
}
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
    missing_reason: Text | str = ""  # reason why the image is not readable
    heatmap: str | None = None  # image with its heatmap overlay; None without a heatmap


@dataclass(frozen=True)
class Pictures:
    """The review queue: `least_sure` and `most_unlike` images, the color scale, and notes on gaps."""

    least_sure: Sequence[Card] = ()
    most_unlike: Sequence[Card] = ()
    scale: str | None = None
    notes: Sequence[Text] = field(default_factory=tuple)


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
        tables: `failures`, `mean_severity`, `other_symptoms` (from `count_other_symptoms`), and the slices
            `folders` and `devices` (None where no name has a device) of `ResultRows`.
        pictures: Review queue.
        versions: Versions of the libraries.
    """
    summary = _OPTIONAL | summary
    drift = summary_drift(summary, spec)
    return page.render(
        "grading.html",
        summary=summary,
        warnings=list_warnings(spec, summary, drift),
        names=page.grade_texts(spec.grade_names),
        grades=_grades(spec, summary, drift),
        drift=drift,
        drift_text=drift_text(drift, spec.gates is not None),
        statistics=sorted(drift.statistics or (), key=lambda statistic: -statistic.psi),
        levels=_LEVELS,
        pictures=pictures,
        least_sure=pictures.least_sure,
        most_unlike=pictures.most_unlike,
        reasons=REASONS,
        codes=IMAGE_CODES,
        about=describe_model(spec),
        versions=versions,
        **tables,
    )


def summary_drift(summary: dict[str, Any], spec: BundleSpec) -> Drift:
    """Measure the drift from the counts in a summary."""
    inputs = summary.get("inputs")
    return measure_drift(Counts.model_validate(inputs) if inputs else None, summary["by_grade"], spec)


def list_warnings(spec: BundleSpec, summary: dict[str, Any], drift: Drift) -> list[Text]:
    """List the warnings about the results, one line each."""
    lines = []
    if spec.warning:
        lines.append(text("the model was {warning}", warning=text(spec.warning)))
    if missing := summary["rows_unaccounted"]:
        lines.append(
            text(
                "{missing} of {rows} images are not accounted for exactly once; run the same command again",
                missing=page.number(missing),
                rows=page.number(summary["rows"]),
            )
        )
    if summary["failed"] > _MANY_FAILED * summary["rows"]:
        code, count = max(summary["by_error"].items(), key=lambda item: item[1])
        lines.append(
            text(
                "{share} of the images failed, most of them ({count}) because {reason}",
                share=f"{summary['failed'] / summary['rows']:.0%}",
                count=page.number(count),
                reason=text(IMAGE_CODES.get(code, code)),
            )
        )
    if count := summary["by_reason"].get(NOT_FINITE):
        lines.append(
            text(
                "the scores of {count} images are not finite numbers, so their grades mean nothing; grade "
                "them again with --precision fp32, or on another machine",
                count=page.number(count),
            )
        )
    if drift.flag:
        lines.append(drift_text(drift, spec.gates is not None))
    if spec.training.split is not None and (leak := leak_warning(spec.training.split)):
        lines.append(text("the model was trained on a {warning}", warning=leak))
    return lines


def drift_text(drift: Drift, has_gates: bool) -> Text:
    """The sentence of a drift in both languages."""
    names = [name for name in list_drifting(drift) if name != GRADE_MIX]
    listed = [page.word("statistic", name) for name in names[:_NAMED]]
    if more := len(names) - len(listed):
        listed.append(text("{count} more", count=more))
    if drift.grades.level == drift.level:
        listed.append(text(GRADE_MIX))
    sentence = text(_DRIFTS[drift.level], names=page.join(listed), least=MIN_PHOTOGRAPHS)
    if drift.statistics is None:
        why = text("nothing else was counted") if has_gates else text("the bundle has no gates")
        return text("{sentence} (only the grade mix was compared: {why})", sentence=sentence, why=why)
    return sentence


def describe_model(spec: BundleSpec) -> list[tuple[Text, Text]]:
    """Describe the model for users of an AI device, in terms and texts, as the endpoint's page does."""
    scores = spec.metrics.get("val") or {}
    interval = (scores.get("intervals") or {}).get("qwk")
    performance = text("Not recorded.")
    if interval:
        performance = text(
            "The grade of the reader for {top1} of {count} validation images; quadratic weighted kappa {qwk} "
            "(95 % interval {low} to {high}). These images also chose the model, so expect less.",
            top1=f"{scores['top1']:.0%}",
            count=page.number(scores["n"]),
            qwk=f"{scores['qwk']:.2f}",
            low=f"{interval['low']:.2f}",
            high=f"{interval['high']:.2f}",
        )
    return [
        (
            text("version"),
            text(
                '<span class="name">{version}</span>, made on {date}',
                version=spec.model_version,
                date=f"{spec.created_at:%Y-%m-%d}",
            ),
        ),
        (
            text("task"),
            _describe_task(spec),
        ),
        (
            text("trained on"),
            text("Synthetic images, at least in part. Not for clinical use.")
            if spec.training.synthetic
            else text("Graded images; the model card in the bundle describes them."),
        ),
        (text("expected performance"), performance),
        (
            text("limits"),
            text(
                "Other microscopes, wet or treated hair and unusual light can make it wrong more often. "
                "Grades of anything other than a scalp mean nothing."
            ),
        ),
    ]


def _describe_task(spec: BundleSpec) -> Text:
    names = [spec.symptom, *spec.graded_others]
    if names == [SYMPTOM_IDS[0]]:
        return text(
            "Four grades of fine flaking on one image of the scalp taken through a microscope. It grades "
            "nothing else."
        )
    return text(
        "Four grades of {symptoms} on one image of the scalp taken through a microscope. It grades nothing "
        "else.",
        symptoms=page.join(page.word("symptom", name) for name in names),
    )


def _grades(spec: BundleSpec, summary: dict[str, Any], drift: Drift) -> list[dict[str, Any]]:
    return [
        {
            "count": summary["by_grade"].get(name, 0),
            "share": drift.grades.shares[name],
            "share_at_training": drift.grades.shares_at_training[name],
        }
        for name in spec.grade_names
    ]
