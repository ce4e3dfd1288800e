"""`MODEL_CARD.md` of a bundle, written from its contract."""

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

{warning}## What it reached
On the validation part ({n} photographs{unseen}), which also chose the epoch and
the calibration, so it flatters; `scalp evaluate` gives the test figures.

| metric | value | {interval_head} |
| --- | --- | --- |
{metrics}
{slices}
## What it answers
Probabilities are calibrated (temperature {temperature:.3f}{ece}
A grade set holds the true grade in
{coverage:.0%} of cases like the validation part's. A photograph is referred to a person when its
set has more than {max_set_size} grade, or its likeliest grade less than {min_confidence:.0%}.
{gates}

## Limits
- Figures hold for photographs like those it was measured on; another microscope or clinic can be worse.
- Intervals are by group; with fewer than some ten groups they are too narrow.
- The temperature and the sets were fitted without test-time augmentation.
- How far readers of such photographs agree among themselves was not measured.

## What it is made of
- architecture `{architecture}`, first weights: {initial_weights}, input {size}x{size} ({resize})
- {photographs} training photographs by grade: {counts}
- {split}
- best epoch {best_epoch} of {epochs}, {workers} workers{computed_by}
- data sha256 `{data}`
- weights sha256 `{weights}`
- revision `{revision}`, {versions}
{graphs}"""


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
    """The card as Markdown; every figure in it comes from the bundle's contract."""
    names = [f"{index} {name} ({GRADE_NAMES_KO[index]})" for index, name in enumerate(spec.grade_names)]
    counts, split, val = spec.training.grade_counts, spec.training.split, spec.metrics["val"]
    warnings = (spec.warning, split and split.warning)
    return _TEMPLATE.format(
        n=val["n"],
        interval_head=f"95 %, {val['intervals']['groups']} groups" if "intervals" in val else "95 %",
        metrics="\n".join(_metric_rows(val)),
        slices=_slice_table(val.get("slices", {})),
        ece=_ece_lines(val.get("calibration", {})),
        version=spec.model_version,
        warning="".join(f"**{line[0].upper()}{line[1:]}.**\n\n" for line in warnings if line),
        unseen=" of devices that training did not see" if split and _keeps_devices_apart(split) else "",
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


def _gates_line(gates: Gates | None) -> str:
    if gates is None:
        return "It has no gates: blurred photographs and pictures of something else are graded like others."
    return (
        "It is referred as well when it is blurred, too dark, too bright, or unlike the "
        f"{gates.photographs} training photographs that were measured (docs/gates.md)."
    )


def _ece_lines(calibrated: dict[str, Any]) -> str:
    """The rest of the sentence; a bundle from before ECE was compared with chance has none of it."""
    chance = calibrated.get("if_calibrated_after")
    if chance is None:
        return ")."
    return (
        "; ECE {ece_before:.3f} without it, {ece_after:.3f} with it).\n".format(**calibrated)
        + f"A perfectly calibrated model has an ECE of {chance['mean']:.3f} on so many photographs by chance "
        f"alone,\nand up to {chance['high']:.3f} in 95 % of cases: an ECE below that is no sign of bad "
        "calibration."
    )


def _computed_line(computed_by: str | None) -> str:
    """Nothing for a bundle from before it was recorded."""
    return f"\n- validation figures computed by {computed_by}" if computed_by else ""


def _metric_rows(val: dict[str, Any]) -> list[str]:
    """Rows of what was measured: a bundle from before intervals has fewer metrics, and none of them."""
    return [
        f"| {label} | {_number(val[name])} | {_bounds(val.get('intervals', {}).get(name))} |"
        for name, label in _METRICS.items()
        if name in val
    ]


def _slice_table(slices: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        f"| {column} {row['value']}{' (few)' if row['small'] else ''} | {row['n']} | {_number(row['qwk'])} | "
        f"{_bounds(row['intervals']['qwk'])} | {_number(row['top1'])} | {_number(row['mae'])} |"
        for column, found in slices.items()
        for row in found
    ]
    if not rows:
        return ""
    head = ["", "| slice | photographs | kappa | 95 % | top-1 | mean error |", "| --- " * 6 + "|"]
    return "\n".join([*head, *rows, ""])


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _bounds(bound: dict[str, Any] | None) -> str:
    return "" if bound is None else f"{bound['low']:.3f} to {bound['high']:.3f}"


def _keeps_devices_apart(split: SplitSpec) -> bool:
    return split.method == "group" and "device" in split.keys


def _split_line(split: SplitSpec | None, fold: int | None) -> str:
    if split is None:
        return "how the parts were made was not recorded"
    pairs = ", ".join(f"{key.replace('_', '-')} {count}" for key, count in split.leaking_pairs.items())
    part = f", fold {fold} of {split.folds} for validation" if fold is not None else ""
    return (
        f"parts {split.ratio} ({split.method}, seed {split.seed}){part}; "
        f"pairs of photographs in two parts that share a: {pairs}"
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
