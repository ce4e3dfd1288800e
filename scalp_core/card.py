"""`MODEL_CARD.md` of a bundle, written from its contract."""

from __future__ import annotations

from scalp_core.bundle import BundleSpec, GraphRecord
from scalp_core.grades import GRADE_NAMES_KO
from scalp_core.manifest import SplitSpec
from scalp_core.quality import Gates

_TEMPLATE = """\
# {version}

Grades the severity of micro-keratin (미세각질, fine flaking) on one photograph of a scalp taken through a
microscope: {grades}.

**Not a diagnosis.** For research and for screening by trained staff; a person decides. Grades of photographs
unlike the training data (other optics, wet or treated hair, no scalp) mean nothing.

{warning}## What it reached
On the validation part ({n} photographs{unseen}), which also chose the epoch and
the calibration, so it flatters; `scalp evaluate` gives the test figures.

| metric | value |
| --- | --- |
| quadratic weighted kappa | {qwk:.3f} |
| top-1 accuracy | {top1:.3f} |
| macro F1 | {macro_f1:.3f} |
| mean absolute error, grades | {mae:.3f} |

## What it answers
Probabilities are calibrated (temperature {temperature:.3f}). A grade set holds the true grade in
{coverage:.0%} of cases like the validation part's. A photograph is referred to a person when its
set has more than {max_set_size} grade, or its likeliest grade less than {min_confidence:.0%}.
{gates}

## What it is made of
- architecture `{architecture}`, first weights `{initial_weights}`, input {size}x{size} ({resize})
- {photographs} training photographs by grade: {counts}
- {split}
- best epoch {best_epoch} of {epochs}, {workers} workers
- data sha256 `{data}`
- weights sha256 `{weights}`
- revision `{revision}`, {versions}
{graphs}"""


def model_card(spec: BundleSpec) -> str:
    """The card as Markdown; every figure in it comes from the bundle's contract."""
    names = [f"{index} {name} ({GRADE_NAMES_KO[index]})" for index, name in enumerate(spec.grade_names)]
    counts, split = spec.training.grade_counts, spec.training.split
    return _TEMPLATE.format(
        **spec.metrics["val"],
        version=spec.model_version,
        warning=f"**{split.warning}.**\n\n" if split and split.warning else "",
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
        f"{record.photographs} validation photographs, kappa {-record.qwk_drop:+.4f}\n"
    )
