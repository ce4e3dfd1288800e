"""Audit a source: decide which images to keep, group and split them, and write the manifest.

Each image is in the manifest, or in `dropped.parquet` with a reason. `findings.parquet` lists irregularities.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from scalp_core.curation import splits
from scalp_core.curation.audit_summary import count_all, pick_examples
from scalp_core.curation.queries import AuditTables, open_audit_tables
from scalp_core.curation.split_groups import group_images, number_components, unite
from scalp_core.datasets.group_by import GroupBy
from scalp_core.datasets.manifest import DataSpec, SplitMethod, SplitSpec, Task
from scalp_core.errors import SourceError
from scalp_core.grades import SYMPTOMS

GROUP_KEYS = ("device", "session", "near_duplicate")
"""Keys that can group images; equal content and the groups of a table apply in addition."""


@dataclass(frozen=True)
class Options:
    """Options of an audit: task, symptom, split and groups."""

    task: Task | None = None  # None: folder or table, by the source
    symptom: str = SYMPTOMS[0]
    ratio: str = "7:2:1"
    method: SplitMethod = "group"
    keys: tuple[str, ...] = GROUP_KEYS
    folds: int | None = None
    seed: int = 0
    group_by: str | None = None  # further key, by the path of an image; see `GroupBy`
    extend: str | None = None  # prepared data whose images are among the objects, with their splits


def audit(examined: str, source: str, out: str, options: Options, is_table: bool = False) -> dict[str, Any]:
    """Audit examined objects: keep, group and split images, and write manifest, dropped and findings.

    Args:
        examined: Folder of Parquet files of `scan.EXAMINED`.
        source: Source of the images, recorded in `data.json`.
        out: Data directory to write.
        options: Options of the audit.
        is_table: Whether the labels came from a table.

    Returns:
        Counts, and examples for the report.

    Raises:
        SourceError: no image has a label for the task.
        UserError: too few groups.
    """
    group_by = GroupBy(options.group_by) if options.group_by else None
    with open_audit_tables(examined, source, group_by) as tables:
        layout = tables.find_layout(is_table, options.task)
        task = options.task or ("table" if layout == "table" else "folder")
        _check_task(layout, task, source)
        tables.label_images(layout, task, options.symptom)
        _check_any_kept(tables, source, layout, task, options)
        if options.extend:
            _extend(tables, options.extend)
        near = tables.find_near_duplicates()
        tables.collect_findings(layout, near)
        record = _divide(tables, near.pairs, task, options)
        tables.write_outputs(out)
        symptoms = tables.describe_symptoms()
        has_symptom = (
            layout == "aihub"
            or (layout == "table" and symptoms["symptoms"])
            or options.symptom != SYMPTOMS[0]  # of labels in folders or a table, as the user says
        )
        spec = DataSpec(
            created_at=datetime.now(UTC),
            source=source,
            layout=layout,
            task=task,
            symptom=options.symptom if has_symptom else None,
            split=record,
            photographs=tables.number("select count(*) from kept"),
            sha256=tables.fingerprint(),
            **symptoms,
            soft_labels=tables.number("select count(soft_label) from kept"),
            synthetic=tables.number("select count(*) from object where synthetic") > 0,
        )
        new_images = tables.number("select count(*) from kept anti join extended using (sha256)")
        counts = {"new_images": new_images} | count_all(tables) | pick_examples(tables, near.pairs)
    return {
        "spec": spec.model_dump(mode="json"),
        **counts,
    }


def _check_task(layout: str, task: str, source: str) -> None:
    if layout == "table" and task != "table":
        raise SourceError(
            f"--label-source {task}: the table {source} has its own labels; omit --label-source"
        )
    if task == "json" and layout != "aihub":
        raise SourceError(
            f"--label-source json: {source} has no label files of AI Hub; use --label-source folder"
        )


def _check_any_kept(tables: AuditTables, source: str, layout: str, task: str, options: Options) -> None:
    if tables.number("select count(*) from photo where reason is null") and (
        task == "unlabelled" or layout != "unlabelled"
    ):
        return
    photographs = tables.number("select count(*) from photo")
    if not photographs:
        raise SourceError(f"{source} holds no images; check the path")
    reasons = tables.rows(
        "select reason, count(*) as n from photo where reason is not null group by reason order by n desc"
    )
    listed = ", ".join(f"{row['n']} {row['reason']}" for row in reasons)
    problem = f"{source} holds {photographs} images and no grade for any of them" + f" ({listed})" * bool(
        listed
    )
    if layout == "table":
        graded = tables.find_symptoms()
        fix = f"use --symptom {graded[0]}" if graded else "check its columns uri, label and those of symptoms"
        raise SourceError(f"{problem}; {fix}, or use --label-source unlabelled")
    raise SourceError(
        f"{problem}: neither AI Hub folders ([원천]{options.symptom}_0.양호 …), nor label files for "
        "--label-source json, nor class folders (0 1 2 3, or good mild moderate severe); check the path and "
        "--symptom, or use --label-source unlabelled"
    )


def _extend(tables: AuditTables, data: str) -> None:
    """Read the rows of extended data, and check that each of its images is still there."""
    tables.read_extended(data)
    lost = tables.rows("""
        select uri, photo.reason from extended anti join (from photo where reason is null) using (sha256)
            left join photo using (uri) order by all
    """)
    if lost:
        raise SourceError(
            f"{len(lost)} images of {data} cannot be read, such as {lost[0]['uri']} ({lost[0]['reason']}); "
            "restore them, or prepare all labels again without --extend"
        )


def _divide(tables: AuditTables, near: np.ndarray, task: str, options: Options) -> SplitSpec:
    """Group the candidates, and assign splits and folds to the kept images."""
    rows = tables.read_candidates()
    ids, kept, labels = rows["id"], rows["kept"], rows["label"]
    # Delivered splits share microscopes: only sessions and copies can be separated.
    chosen = tuple(key for key in options.keys if not (options.method == "official" and key == "device"))
    edges = np.searchsorted(ids, near)
    alike = number_components(edges, len(ids))
    # Copies, and near-duplicates where these group.
    same_keys = [rows["content"], *([alike] if "near_duplicate" in chosen else [])]
    same = unite(same_keys, len(ids)).astype(np.uint64) + np.uint64(1)
    keys = [rows[name] for name in ("given_group", "device", "session") if name in (*chosen, "given_group")]
    groups = group_images(keys, same, rows["is_flat"])
    method: SplitMethod = "none" if task == "unlabelled" else options.method
    if options.extend:
        parts = np.full(len(ids), None, dtype=object)
        parts[kept] = splits.extend_splits(tables.known_splits(ids)[kept], groups.of_row[kept])
    else:
        parts = _split_rows(method, labels, kept, groups.of_row, rows["part"], options)
    parts[rows["is_soft"] & ((parts == "val") | (parts == "test"))] = "not_soft"
    folds = np.full(len(ids), -1)
    if options.folds and method != "none":
        pool = (parts == "train") | (parts == "val")
        units = np.arange(len(ids)) if method == "random" else groups.of_row
        folds[pool] = splits.assign_folds(labels[pool], units[pool], options.folds, options.seed)
    assigned = {
        "id": ids,
        "component": groups.of_row,
        "split": pa.array(parts, pa.string()),
        "fold": pa.array(folds, mask=folds < 0),
    }
    tables.assign_splits(pa.table(assigned), chosen)
    row, images, joined = groups.refused.T
    tables.add_joints(ids[row], images, joined)
    placed = kept & ((parts == "train") | (parts == "val") | (parts == "test"))
    shared = {"device": rows["device"], "session": rows["session"], "near_duplicate": alike}
    return SplitSpec(
        method=method,
        ratio=options.ratio,
        seed=options.seed,
        keys=("content", *chosen),
        folds=options.folds,
        leaking_pairs={
            key: splits.count_leaking_pairs(shared[key][placed], parts[placed]) for key in GROUP_KEYS
        } if method != "none" else {},
    )  # fmt: skip


def _split_rows(
    method: SplitMethod,
    labels: np.ndarray,
    kept: np.ndarray,
    groups: np.ndarray,
    delivered: np.ndarray,
    options: Options,
) -> np.ndarray:
    """Split of each row; None without a split, "overlap" if the test split has its group."""
    parts = np.full(len(labels), None, dtype=object)
    ratio = splits.parse_ratio(options.ratio)
    if method == "group":
        parts[kept] = splits.split_by_group(labels[kept], groups[kept], ratio, options.seed)
    elif method == "random":
        parts[kept] = splits.split_at_random(labels[kept], ratio, options.seed)
    elif method == "official":
        names = np.array(["", "Training", "Validation"], dtype=object)[delivered[kept]]
        official = splits.split_as_delivered(labels[kept], groups[kept], names, ratio, options.seed)
        parts[kept] = np.where(official == None, "overlap", official)  # noqa: E711 -- element by element
    return parts
