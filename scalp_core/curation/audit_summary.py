"""Counts and examples of an audited source, for `summary.json` and `report.html`."""

from __future__ import annotations

from typing import Any

import numpy as np

from scalp_core.curation.findings import FINDINGS
from scalp_core.curation.queries import AuditTables
from scalp_core.datasets import manifest
from scalp_core.grades import GRADE_NAMES

_DROPPED_OTHERS = (
    "select code, count(*) from object where kind in ('archive', 'other') and code is not null group by code"
)
_EXAMPLES = 8
_SHEET_COLUMNS = 8
_LARGEST_GROUPS = 3

# Findings that are counted by name, content or pair, and not by file.
_BY_DETAIL = {
    "label_files_differ", "content_in_several_symptoms", "content_in_both_parts", "conflicting_contents",
    "grades_of_copies_differ", "same_name_other_content",
}  # fmt: skip


def count_all(tables: AuditTables) -> dict[str, Any]:
    """Counts for the summary and the report."""
    placed = "from kept where split is not null"
    groups = tables.count(
        f"select split, count(*) from (select distinct split, component {placed}) group by split"
    )
    devices = tables.count(
        f"select split, count(*) from (select distinct split, site, device {placed} "
        "and site || device is not null) group by split"
    )
    return {
        "objects": tables.count("select kind, count(*) from object group by kind"),
        "dropped": tables.count(
            "select reason, count(*) from photo where reason is not null group by reason "
            f"union all {_DROPPED_OTHERS}"
        ),
        "findings": _findings(tables),
        "parts": {
            name: {
                "photographs": tables.number(f"select count(*) from kept where split = '{name}'"),
                "groups": groups.get(name, 0),
                "devices": devices.get(name, 0),
                "by_grade": _grades(tables, f"where split = '{name}'"),
            }
            for name in manifest.SPLITS
        },
        "largest_groups": tables.rows(f"""
            select any_value("group") as "group", count(*) as photographs
            from kept group by component order by photographs desc, "group" limit {_LARGEST_GROUPS}
        """),
        "folds": [
            {"fold": number, "by_grade": _grades(tables, f"where fold = {number}")}
            for number in range(tables.number("select coalesce(max(fold) + 1, 0) from kept"))
        ],
        "by_grade": _grades(tables, ""),
        "unlabelled": tables.number("select count(*) from kept where label is null and soft_label is null"),
        "dropped_other": tables.count(_DROPPED_OTHERS),
        "could_not_be_fetched": tables.number("select count(*) from object where code = 'fetch_failed'"),
        "by": {
            column: _slices(tables, column) for column in ("site", "device", "position", "sex", "age")
        },
        "grouped_by": tables.count("""
            select case when given_group is not null then 'group of the table'
                when device is not null then 'device' else 'photograph' end, count(*)
            from photo where reason is null group by all
        """),
    }  # fmt: skip


def pick_examples(tables: AuditTables, near: np.ndarray) -> dict[str, Any]:
    """Pick a few images of each kind for the report; `near`: int (P, 2), ids of near-duplicates."""
    return {
        "sheets": {
            grade: tables.rows(f"""
                select pick.uri as uri, pick.member as member from (
                    select unnest(picks) as pick, generate_subscripts(picks, 1) as turn from (
                        select min_by({{'uri': uri, 'member': member, 'image_id': image_id}}, image_id,
                            {_SHEET_COLUMNS}) as picks
                        from kept where label = {grade} group by site, device
                    )
                ) order by turn, pick.image_id limit {_SHEET_COLUMNS}
            """)
            for grade in range(len(GRADE_NAMES))
        },
        "near_pairs": [
            [tables.rows(f"select uri, member, label from photo where id = {id_}")[0] for id_ in pair]
            for pair in near[:_EXAMPLES].tolist()
        ],
        "dropped_examples": tables.rows(f"""
            select reason, pick.uri as uri, pick.member as member, pick.detail as detail from (
                select reason, unnest(min_by({{'uri': uri, 'member': member, 'detail': detail}}, id,
                    {_EXAMPLES // 2})) as pick
                from photo where reason is not null group by reason
            ) order by reason, uri
        """),
    }  # fmt: skip


def _findings(tables: AuditTables) -> dict[str, int]:
    """Count the findings by name, in the unit that `FINDINGS` gives: files, names, contents or pairs."""
    files = tables.count("select finding, count(*) from finding group by finding")
    words = ", ".join(f"'{word}'" for word in sorted(_BY_DETAIL))
    contents = tables.count(
        "select finding, count(*) from "
        f"(select distinct finding, detail from finding where finding in ({words})) group by finding"
    )
    return {word: (contents if word in _BY_DETAIL else files).get(word, 0) for word in FINDINGS}


def _grades(tables: AuditTables, where: str) -> dict[str, int]:
    rows = tables.rows(f"select label, count(*) as n from kept {where} group by label")
    counts = {row["label"]: row["n"] for row in rows}
    return {name: counts.get(grade, 0) for grade, name in enumerate(GRADE_NAMES)}


def _slices(tables: AuditTables, column: str) -> list[dict[str, Any]]:
    grades = ", ".join(f"count(*) filter (label = {grade})" for grade in range(len(GRADE_NAMES)))
    return tables.rows(f"""
        select {column} as value, count(*) as photographs, [{grades}] as by_grade
        from kept group by {column} order by value nulls last
    """)
