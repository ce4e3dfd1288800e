"""`scalp calibrate`: fit the decision, gates and drift of a bundle to a clinic's own labeled images."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.common.console import SUMMARY_FILE, console, now, show, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.evaluate.driver import check_symptom, collect_finite_columns
from scalp_core import storage
from scalp_core.bundles.bundle import CARD_FILE, Bundle, save_bundle
from scalp_core.bundles.contract import BundleSpec, LocalCalibration
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import subgroups
from scalp_core.evaluation.bootstrap import FEW_GROUPS
from scalp_core.evaluation.targets import parse_targets
from scalp_core.images import gates as image_gates
from scalp_core.inference import calibration
from scalp_core.inference.fitting import fit_decision
from scalp_core.storage import outputs

KIND = "calibrate"
MIN_IMAGES = 100
"""Fewest labeled images: gates and four biases need as many."""


def calibrate(
    bundle: str,
    data: str,
    out: str,
    target: str,
    coverage: float = 0.9,
    split: str = "all",
    options: ModelOptions = ModelOptions(),  # noqa: B008
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Write a new bundle, with the same weights, whose decision is fitted to labeled images.

    Args:
        bundle: Directory of the bundle.
        data: Directory that `scalp prepare` wrote, with images that training did not see.
        out: Output directory, for `bundle` and `summary.json`; its name is that of the new bundle.
        target: Targets of referral, for `evaluation.targets.parse_targets`.
        coverage: Least promised coverage of the grade sets.
        split: train, val, test, or all.
        options: Device, precision and runtime of the model.
        executor: Runs the steps; default: Ray.

    Returns:
        The summary.

    Raises:
        UserError: Invalid input, too few images, or images of the training; or as in `evaluate`.
    """
    try:
        targets = parse_targets(target)
    except ValueError as error:
        raise UserError(f"--target {target}: {error}") from None
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [data])
    loaded = load_bundle(bundle)
    rows, data_sha256 = _labeled_rows(loaded.spec, data, split)
    with outputs.open_output(out, KIND, [data]) as output:
        labels, groups = np.array(rows["label"].to_pylist()), rows["group"].to_pylist()
        columns, computation = collect_finite_columns(loaded, rows, options, executor)
        logits, statistics = columns["logits"], columns["statistics"]
        spec = fit_decision(
            loaded.spec.model_copy(update={"gates": image_gates.fit_gates(statistics, None, groups)}),
            logits, statistics, labels, groups, coverage=coverage, targets=targets, prior_moved=True,
        )  # fmt: skip
        metrics = subgroups.validation_metrics(
            labels,
            calibration.calibrated(logits, loaded.spec),
            calibration.calibrated(logits, spec),
            groups,
            {},
        )
        spec = spec.model_copy(
            update={
                "name": out.rpartition("/")[2],
                "created_at": datetime.now(UTC),
                "calibrated_on": LocalCalibration(
                    model_version=loaded.spec.model_version,
                    data_sha256=data_sha256,
                    images=len(labels),
                    groups=len(set(groups)),
                ),
                "metrics": loaded.spec.metrics
                | {"calibration": {"computed_by": computation.computed_by} | metrics},
                # int8 was compared with other grade sets, and its images are not here.
                "graphs": {kind: record for kind, record in loaded.spec.graphs.items() if kind != "int8"},
            }
        )
        output.check()
        _save(storage.join(out, "bundle"), loaded, spec)
        summary = _summarize(loaded.spec, spec, metrics)
        write_json(storage.join(out, SUMMARY_FILE), summary)
    _show(summary, spec, loaded.spec, out)
    return summary


def _labeled_rows(spec: BundleSpec, data: str, split: str) -> tuple[pa.Table, str]:
    """Read the labeled rows, and the hash of their data.

    Raises:
        UserError: They are of another symptom or of the training, or too few.
    """
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    check_symptom(spec, data_spec, data)
    if data_spec.sha256 == spec.training.data_sha256 and split in ("all", "train"):
        raise UserError(
            f"{data} is the data that {spec.name} was trained on, so its answers to them are too good; give "
            "other labeled images, or --split val"
        )
    rows = (
        table.filter(pc.field("label").is_valid()) if split == "all" else manifest.select_split(table, split)
    )
    if rows.num_rows < MIN_IMAGES:
        raise UserError(
            f"{data} has {rows.num_rows} labeled images in split {split}; at least {MIN_IMAGES} are needed, "
            "and 200 to 500 are better"
        )
    return rows, data_spec.sha256


def _save(uri: str, loaded: Bundle, spec: BundleSpec) -> None:
    loaded.fetch("weights")
    if "float" in spec.graphs:
        loaded.fetch("float")
    save_bundle(uri, spec, loaded.files | {CARD_FILE: render_model_card(spec).encode()})


def _summarize(before: BundleSpec, spec: BundleSpec, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "date": now(),
        "model_version": spec.model_version,
        "from": before.model_version,
        **(
            spec.calibrated_on.model_dump(include={"images", "groups", "data_sha256"})
            if spec.calibrated_on
            else {}
        ),
        "temperature": spec.temperature,
        "bias": list(spec.bias or ()),
        "conformal": spec.conformal.model_dump(mode="json"),
        "referral": spec.referral.model_dump(mode="json"),
        "metrics": metrics,
    }


def _show(summary: dict[str, Any], spec: BundleSpec, before: BundleSpec, out: str) -> None:
    promised = [groups > 0 for groups in spec.conformal.grade_groups or ()]
    names = [name for name, own in zip(spec.grade_names, promised, strict=True) if not own]
    show(
        "calibrate",
        {
            "model": spec.model_version,
            "from": before.model_version,
            "images": f"{summary['images']:,} in {summary['groups']} groups",
            "grade sets": f"contain the true grade in {spec.conformal.coverage:.1%}"
            + (f", not promised for {', '.join(names)}" if names else ""),
            **{f"target {target.kind}": str(target) for target in spec.referral.targets or ()},
            "bundle": storage.join(out, "bundle"),
        },
    )
    if summary["groups"] == 1:
        console.print("all images are of one group: promises hold for that microscope alone")
    elif summary["groups"] < FEW_GROUPS:
        console.print(f"only {summary['groups']} groups: promises for other microscopes are weak")
    if "int8" in before.graphs:
        console.print("the int8 graph is not in the new bundle: it was compared with the former grade sets")
