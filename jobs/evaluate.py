"""`scalp evaluate`: a bundle on one part of the prepared data, every photograph exactly once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from cluster.local import connect
from jobs.console import SUMMARY_FILE, console, now, write_json
from jobs.images import photographs
from jobs.pipeline import ModelOptions, with_logits
from scalp_core import manifest, metrics, report, storage
from scalp_core.bundle import Bundle, load_bundle
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES
from scalp_core.grading import gradings


def collect_logits(bundle: Bundle, rows: pa.Table, options: ModelOptions) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 (N, 4) and statistics float32 (N, K) of the rows of a manifest, in their order.

    Raises:
        UserError: a photograph cannot be read: a number for a part of the rows is not what was asked for.
    """
    wanted = rows["image_id"].to_pylist()
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    taken = 0
    cluster = connect()
    dataset = photographs(rows.select(["image_id", "uri", "member"]))
    for batch in with_logits(dataset, bundle, options, cluster).iter_batches():
        failed = np.flatnonzero(batch["error_code"] != "")
        if failed.size:
            uri, error = batch["uri"][failed[0]], batch["error"][failed[0]]
            raise UserError(
                f"{uri} cannot be read any more ({error}); restore it, or run scalp prepare again"
            )
        answers = zip(batch["logits"], batch["statistics"], strict=True)
        found |= dict(zip(batch["image_id"], answers, strict=True))
        taken += len(batch["image_id"])
    if taken != len(wanted) or set(found) != set(wanted):
        raise RuntimeError(f"{taken} answers for {len(wanted)} photographs")
    logits, statistics = zip(*(found[image_id] for image_id in wanted), strict=True)
    return np.stack(logits), np.stack(statistics)


def evaluate(
    bundle: str,
    data: str,
    out: str,
    split: str = "test",
    options: ModelOptions = ModelOptions(),  # noqa: B008
) -> dict[str, Any]:
    """Scores a bundle.

    Args:
        bundle: directory of the bundle.
        data: directory that `scalp prepare` wrote.
        out: directory for `summary.json`, `confusion.png` and `predictions.parquet`.
        split: train, val or test.

    Returns:
        the summary.
    """
    out = storage.absolute(out)
    loaded = load_bundle(bundle)
    version = loaded.spec.version_in(options.precision)
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if loaded.spec.training.fold is not None and loaded.spec.training.data_sha256 == data_spec.sha256:
        table = manifest.with_fold(table, loaded.spec.training.fold)
    rows = manifest.part(table, split)
    answers = gradings(*collect_logits(loaded, rows, options), loaded.spec)
    labels = np.array(rows["label"].to_pylist())
    grades = np.array([answer.grade for answer in answers])
    summary: dict[str, Any] = {
        "kind": "evaluate",
        "date": now(),
        "model_version": version,
        "data_sha256": data_spec.sha256,
        "split": split,
        "split_method": data_spec.split.method,
        "leaky": data_spec.split.leaky,
        "leaking_pairs": data_spec.split.leaking_pairs,
        "groups": len(set(rows["group"].to_pylist())),
        "metrics": metrics.score(labels, grades),
        "majority": metrics.majority_baseline(labels, loaded.spec.majority_grade),
        "coverage": float(np.mean([label in a.grade_set for label, a in zip(labels, answers, strict=True)])),
        "referred": float(np.mean([answer.refer for answer in answers])),
    }
    title = f"{version}\n{split}: {len(labels)} photographs" + ", LEAKY SPLIT" * data_spec.split.leaky
    picture = report.confusion_matrix(summary["metrics"]["confusion"], title)
    storage.write(storage.join(out, "confusion.png"), picture)
    predictions = rows.append_column("grade", pa.array(grades, pa.int8()))
    predictions = predictions.append_column("probabilities", pa.array([a.probabilities for a in answers]))
    storage.write_parquet(storage.join(out, "predictions.parquet"), predictions)
    write_json(storage.join(out, SUMMARY_FILE), summary)
    _show(summary, title.replace("\n", " on "))
    if data_spec.split.warning:
        console.print(data_spec.split.warning)
    console.print(f"confusion matrix: {storage.join(out, 'confusion.png')}")
    return summary


def _show(summary: dict[str, Any], title: str) -> None:
    table = Table("", "this model", "always the majority grade", title=title, title_justify="left")
    own, majority = summary["metrics"], summary["majority"]
    rows = (("top-1 accuracy", "top1"), ("quadratic weighted kappa", "qwk"), ("macro F1", "macro_f1"),
            ("mean absolute error", "mae"))  # fmt: skip
    for label, name in rows:
        table.add_row(label, f"{own[name]:.3f}", f"{majority[name]:.3f}")
    for grade, name in enumerate(GRADE_NAMES):
        for metric in ("recall", "precision"):
            table.add_row(f"{metric} {name}", f"{own[metric][grade]:.3f}", f"{majority[metric][grade]:.3f}")
    console.print(table)
