"""The model card: `MODEL_CARD.md` of a bundle, rendered from its contract."""

from __future__ import annotations

from typing import Any

from scalp_core.bundles.bundle import BundleSpec, GraphRecord
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.grades import GRADE_NAMES_KO
from scalp_core.images.statistics import Gates

_TEMPLATE = """\
# {version}

Grades the severity of micro-keratin (미세각질, fine flaking) on one photograph of a scalp taken through a
microscope: {grades}.

**Not a diagnosis.** For research and for screening by trained staff; a person decides. Grades of photographs
unlike the training data (other optics, wet or treated hair, no scalp) mean nothing.

{warning}## Validation metrics
{validation}
## Calibration and referral
Probabilities are calibrated (temperature {temperature:.3f}{ece}
A grade set contains the true grade in
{coverage:.0%} of cases like those of the validation split. A photograph is referred to a person when its
set has more than {max_set_size} grade, or its likeliest grade less than {min_confidence:.0%}.
{gates}

## Limits
- Metrics hold for photographs like the validation split; another microscope or clinic can be worse.
- Intervals are over groups; with fewer than about ten groups they are too narrow.
- The temperature and the sets were fitted without test-time augmentation.
- The agreement of readers on such photographs was not measured.

## Training and provenance
- architecture `{architecture}`, initial weights: {initial_weights}, input {size}x{size} ({resize})
- {photographs} training photographs by grade: {counts}
- {split}
- best epoch {best_epoch} of {epochs}, {workers} workers{computed_by}
- data sha256 `{data}`
- weights sha256 `{weights}`
- revision `{revision}`, {versions}
{graphs}"""

_VALIDATION = """\
On the validation split ({n} photographs{unseen}). It also chose the epoch and the calibration, so these
metrics are too optimistic; `scalp evaluate` gives those of the test split.

| metric | value | {interval_head} |
| --- | --- | --- |
{metrics}
{slices}"""

_METRICS = {
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


def render_model_card(spec: BundleSpec) -> str:
    """Render the card as Markdown; all of its values come from the bundle's contract."""
    names = [f"{index} {name} ({GRADE_NAMES_KO[index]})" for index, name in enumerate(spec.grade_names)]
    counts, split, val = spec.training.grade_counts, spec.training.split, spec.metrics.get("val", {})
    warnings = (spec.warning, split and split.warning)
    return _TEMPLATE.format(
        validation=_validation(val, split) if val else "No metrics of the validation split are recorded.\n",
        ece=_ece_lines(val.get("calibration", {})),
        version=spec.model_version,
        warning="".join(f"**{line[0].upper()}{line[1:]}.**\n\n" for line in warnings if line),
        split=_split_line(split, spec.training.fold),
        grades=", ".join(names),
        temperature=spec.temperature,
        coverage=spec.conformal.coverage,
        max_set_size=spec.referral.max_set_size,
        min_confidence=spec.referral.min_confidence,
        gates=_gates_line(spec.gates),
        architecture=spec.architecture,
        initial_weights=spec.training.initial_weights,
        size=spec.preprocess.size,
        resize=spec.preprocess.resize,
        photographs=sum(counts),
        counts=", ".join(f"{name} {count}" for name, count in zip(spec.grade_names, counts, strict=True)),
        best_epoch=spec.training.best_epoch,
        epochs=spec.training.recipe["epochs"],
        workers=spec.training.workers,
        computed_by=_computed_line(val.get("computed_by")),
        data=spec.training.data_sha256,
        weights=spec.weights_sha256,
        graphs="".join(_graph_line(kind, record) for kind, record in spec.graphs.items()),
        revision=spec.git_revision,
        versions=", ".join(f"{name} {version}" for name, version in spec.versions.items()),
    )


def _validation(val: dict[str, Any], split: SplitSpec | None) -> str:
    is_unseen = split and split.method == "group" and "device" in split.keys
    return _VALIDATION.format(
        n=val["n"],
        unseen=" of devices that training did not see" if is_unseen else "",
        interval_head=f"95 %, {val['intervals']['groups']} groups" if "intervals" in val else "95 %",
        metrics="\n".join(_metric_rows(val)),
        slices=_slice_table(val.get("slices", {})),
    )


def _gates_line(gates: Gates | None) -> str:
    if gates is None:
        return "It has no gates: blurred photographs and pictures of something else are graded like others."
    return (
        "It is referred as well when it is blurred, too dark, too bright, or unlike the "
        f"{gates.photographs} training photographs that were measured (docs/gates.md)."
    )


def _ece_lines(calibrated: dict[str, Any]) -> str:
    """The end of the calibration sentence, with ECE unless the bundle is older than its comparison."""
    chance = calibrated.get("if_calibrated_after")
    if chance is None:
        return ")."
    return (
        "; ECE {ece_before:.3f} without it, {ece_after:.3f} with it).\n".format(**calibrated)
        + f"A perfectly calibrated model has an ECE of {chance['mean']:.3f} on as many photographs by chance "
        f"alone,\nand up to {chance['high']:.3f} in 95 % of cases: a lower ECE does not show bad "
        "calibration."
    )


def _computed_line(computed_by: str | None) -> str:
    """The line that names the hardware and libraries; empty for bundles older than this record."""
    return f"\n- validation figures computed by {computed_by}" if computed_by else ""


def _metric_rows(val: dict[str, Any]) -> list[str]:
    """Rows of the measured metrics; older bundles have fewer metrics, and no intervals."""
    return [
        f"| {label} | {_number(val[name])} | {_bounds(val.get('intervals', {}).get(name))} |"
        for name, label in _METRICS.items()
        if name in val
    ]


def _slice_table(slices: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        f"| {column} {row['value']}{' (few)' if row['small'] else ''} | {row['n']} | {_number(row['qwk'])} | "
        f"{_bounds(row['intervals']['qwk'])} | {_number(row['top1'])} | {_number(row['mae'])} |"
        for column, column_slices in slices.items()
        for row in column_slices
    ]
    if not rows:
        return ""
    head = ["", "| slice | photographs | kappa | 95 % | top-1 | mean error |", "| --- " * 6 + "|"]
    return "\n".join([*head, *rows, ""])


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _bounds(bound: dict[str, Any] | None) -> str:
    return "" if bound is None else f"{bound['low']:.3f} to {bound['high']:.3f}"


def _split_line(split: SplitSpec | None, fold: int | None) -> str:
    if split is None:
        return "the assignment of splits was not recorded"
    pairs = ", ".join(f"{key.replace('_', '-')} {count}" for key, count in split.leaking_pairs.items())
    validation_fold = f", fold {fold} of {split.folds} for validation" if fold is not None else ""
    return (
        f"splits {split.ratio} ({split.method}, seed {split.seed}){validation_fold}; "
        f"pairs of photographs across splits that share a: {pairs}"
    )


def _graph_line(kind: str, record: GraphRecord) -> str:
    return (
        f"- {kind} graph for CPUs: same grade as the weights on {record.grade_agreement:.2%} of "
        f"{record.photographs} validation photographs, kappa {-record.qwk_drop:+.4f}{_loss_bounds(record)}\n"
    )


def _loss_bounds(record: GraphRecord) -> str:
    bounds = record.comparison
    if bounds is None or bounds.qwk_drop_bound is None or bounds.coverage_drop_bound is None:
        return ""
    return (
        f"; with {bounds.confidence:.1%} confidence it loses {max(0, bounds.qwk_drop_bound):.4f} of kappa "
        f"and {max(0, bounds.coverage_drop_bound):.4f} of coverage at most"
    )
