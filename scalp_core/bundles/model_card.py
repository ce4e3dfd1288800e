"""The model card: `MODEL_CARD.md` of a bundle, rendered from its contract and `model_card.md.jinja`."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

from scalp_core.bundles.contract import BundleSpec
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.grades import GRADE_NAMES_KO, name_symptom

METRICS = {
    "qwk": "quadratic weighted kappa",
    "top1": "top-1 accuracy",
    "within1": "within one grade",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "mae": "mean absolute error, grades",
    "mae_macro": "mean absolute error, mean over grades",
    "auroc": "AUROC, moderate or worse",
    "sensitivity_at_95_specificity": "sensitivity to them at 95 % specificity",
    "rps": "ranked probability score",
    "log_loss": "log loss",
}
"""Names of the metrics that a card shows."""


def render_model_card(spec: BundleSpec) -> str:
    """Render the card as Markdown; all of its values come from the bundle's contract."""
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701  # it is not HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "bounds": _bounds, "losses": _loss_bounds}
    text = resources.files("scalp_core.bundles").joinpath("model_card.md.jinja").read_text("utf-8")
    split, val = spec.training.split, spec.metrics.get("val", {})
    return environment.from_string(text).render(
        spec=spec,
        training=spec.training,
        split=split,
        val=val,
        metrics=METRICS,
        symptom=name_symptom(spec.symptom),
        others=[
            (name_symptom(other.name), other, val.get("other_symptoms", {}).get(other.name))
            for other in spec.other_symptoms
        ],
        grades=[f"{index} {name} ({GRADE_NAMES_KO[index]})" for index, name in enumerate(spec.grade_names)],
        counts=map("{} {}".format, spec.grade_names, spec.training.grade_counts),
        versions=map("{0[0]} {0[1]}".format, spec.versions.items()),
        warnings=list_warnings(spec),
        unseen_devices=split and split.method == "group" and "device" in split.keys,
        slices=[(column, row) for column, rows in val.get("slices", {}).items() for row in rows],
        unpromised=[
            name
            for name, groups in zip(spec.grade_names, spec.conformal.grade_groups or (), strict=False)
            if not groups
        ],
        leaks=[f"{key.replace('_', '-')} {count}" for key, count in split.leaking_pairs.items()]
        if split
        else [],
    )


def list_warnings(spec: BundleSpec) -> list[str]:
    """List what is wrong with a model for use, such as training on synthetic images or a leaky split."""
    split = spec.training.split
    return [warning for warning in (spec.warning, split and split.warning) if warning]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _bounds(bound: dict[str, Any] | None) -> str:
    return "" if bound is None else f"{bound['low']:.3f} to {bound['high']:.3f}"


def _loss_bounds(bounds: Comparison | None) -> str:
    if bounds is None or bounds.qwk_drop_bound is None or bounds.coverage_drop_bound is None:
        return ""
    return (
        f"; with {bounds.confidence:.1%} confidence it loses {max(0, bounds.qwk_drop_bound):.4f} of kappa "
        f"and {max(0, bounds.coverage_drop_bound):.4f} of coverage at most"
    )
