"""From what the objects of a source are to a manifest: what is kept, in which group, in which part.

Nothing is dropped silently: every photograph is in the manifest or in `dropped.parquet` with a reason, and
what is odd is in `findings.parquet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from scalp_core import manifest, split
from scalp_core.errors import SourceError
from scalp_core.grades import SYMPTOMS
from scalp_core.manifest import DataSpec, SplitMethod, SplitSpec, Task
from scalp_core.relations import Relations

GROUP_KEYS = ("device", "session", "near_duplicate")
"""What can make photographs one group; the same content and a table's own groups always do."""


@dataclass(frozen=True)
class Options:
    """What is asked of a source."""

    task: Task | None = None  # None: the source's own, folder or table
    symptom: str = SYMPTOMS[0]
    ratio: str = "7:2:1"
    method: SplitMethod = "group"
    keys: tuple[str, ...] = GROUP_KEYS
    folds: int | None = None
    seed: int = 0


def audit(examined: str, source: str, out: str, options: Options, is_table: bool = False) -> dict[str, Any]:
    """Decides what is kept, groups and splits it, and writes the manifest, the dropped and the findings.

    Args:
        examined: folder of Parquet files of `inventory.EXAMINED`.
        source: for the contract.
        out: data directory to write.
        options: what is asked.
        is_table: the labels came from a table.

    Returns:
        counts, and examples for the report.

    Raises:
        SourceError: there is no photograph with a label as asked.
        UserError: there are too few groups.
    """
    with Relations(examined) as relations:
        layout = relations.layout(is_table, options.task)
        task = options.task or ("table" if layout == "table" else "folder")
        _check_task(layout, task, source)
        relations.decide(layout, task, options.symptom)
        _check_any_kept(relations, source, layout, task, options)
        near = relations.near_duplicates()
        relations.find(layout, near)
        record = _divide(relations, near, task, options)
        relations.write(out)
        spec = DataSpec(
            created_at=datetime.now(UTC),
            source=source,
            layout=layout,
            task=task,
            symptom=options.symptom if layout == "aihub" else None,
            split=record,
            photographs=relations.number("select count(*) from kept"),
            sha256=relations.fingerprint(),
        )
        return {"spec": spec.model_dump(mode="json")} | relations.counts() | relations.examples(near)


def _check_task(layout: str, task: str, source: str) -> None:
    if layout == "table" and task != "table":
        raise SourceError(f"--task {task}: the table {source} brings its own labels; leave --task out")
    if task == "json" and layout != "aihub":
        raise SourceError(f"--task json: {source} has no label files of AI Hub; use --task folder")


def _check_any_kept(relations: Relations, source: str, layout: str, task: str, options: Options) -> None:
    if relations.number("select count(*) from photo where reason is null") and (
        task == "unlabelled" or layout != "unlabelled"
    ):
        return
    photographs = relations.number("select count(*) from photo")
    if not photographs:
        raise SourceError(f"{source} holds no photograph; check the path")
    reasons = relations.rows(
        "select reason, count(*) as n from photo where reason is not null group by reason order by n desc"
    )
    why = ", ".join(f"{row['n']} {row['reason']}" for row in reasons)
    what = f"{source} holds {photographs} photographs and no grade for any of them" + f" ({why})" * bool(why)
    if layout == "table":
        raise SourceError(f"{what}; check its columns uri and label, or use --task unlabelled")
    raise SourceError(
        f"{what}: neither AI Hub folders ([원천]{options.symptom}_0.양호 …), nor label files for "
        "--task json, nor class folders (0 1 2 3, or good mild moderate severe); check the path and "
        "--symptom, or use --task unlabelled"
    )


def _divide(relations: Relations, near: np.ndarray, task: str, options: Options) -> SplitSpec:
    """Groups the candidates, and assigns parts and folds to what is kept."""
    rows = relations.candidates()
    ids = rows["id"].to_numpy()
    kept, labels = rows["kept"].to_numpy(), rows["label"].to_numpy()
    edges = np.searchsorted(ids, near)
    codes = {name: rows[name].to_numpy() for name in ("device", "session", "sha256", "given_group")}
    # As delivered, a microscope is in both parts: only sessions and copies can be kept apart.
    chosen = tuple(key for key in options.keys if not (options.method == "official" and key == "device"))
    united = [codes[name] for name in ("sha256", "given_group", *(set(chosen) & set(codes)))]
    groups = split.unite(united, edges if "near_duplicate" in chosen else edges[:0], len(ids))
    parts = np.full(len(ids), None, dtype=object)
    folds = np.full(len(ids), -1)
    method: SplitMethod = "none" if task == "unlabelled" else options.method
    ratio = split.parse_ratio(options.ratio)
    if method == "group":
        parts[kept] = split.by_group(labels[kept], groups[kept], ratio, options.seed)
    elif method == "random":
        parts[kept] = split.at_random(labels[kept], ratio, options.seed)
    elif method == "official":
        delivered = rows["part"].to_numpy()[kept].astype(str)
        found = split.official(labels[kept], groups[kept], delivered, ratio, options.seed)
        parts[kept] = np.where(found == None, "overlap", found)  # noqa: E711 -- element by element
    if options.folds and method != "none":
        pool = np.isin(parts.astype(str), ("train", "val"))
        units = np.arange(len(ids)) if method == "random" else groups
        folds[pool] = split.k_folds(labels[pool], units[pool], options.folds, options.seed)
    assigned = {
        "id": ids,
        "component": groups,
        "split": pa.array(parts, pa.string()),
        "fold": pa.array(folds, mask=folds < 0),
    }
    relations.assign(pa.table(assigned), chosen)
    placed = kept & np.isin(parts.astype(str), manifest.PARTS)
    near_groups = split.unite([], edges, len(ids))
    shared = {**codes, "near_duplicate": near_groups}
    return SplitSpec(
        method=method,
        ratio=options.ratio,
        seed=options.seed,
        keys=("content", *chosen),
        folds=options.folds,
        leaking_pairs={
            key: split.leaking_pairs(shared[key][placed], parts[placed]) for key in GROUP_KEYS
        } if method != "none" else {},
    )  # fmt: skip
