"""`scalp compare`: compare the answers of two bundles in an endpoint's audit log."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
from rich.table import Table

from jobs.common.console import console, show
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, metrics
from scalp_core.grades import GRADE_NAMES, NUM_GRADES
from scalp_core.storage.duckdb_sql import open_duckdb

# Explicit columns, because a log may lack lines of some kinds.
_COLUMNS = (
    "{time: 'VARCHAR', sha256: 'VARCHAR', model_version: 'VARCHAR', grade: 'INTEGER', refer: 'BOOLEAN', "
    "ms: 'DOUBLE', candidate_error: 'VARCHAR', first: 'STRUCT({one})', candidate: 'STRUCT({one})'}"
).replace(
    "{one}",
    "model_version VARCHAR, grade INTEGER, expected_severity DOUBLE, refer BOOLEAN, forward_ms DOUBLE",
)
# A damaged line becomes a row of nulls.
_READ = (
    "create table lines as select *, time is null and sha256 is null as damaged "  # noqa: S608
    f"from read_json(?, format='newline_delimited', ignore_errors=true, columns={_COLUMNS})"
)
# A retried image counts once, by its last answer.
_BY_MODEL = """
with once as (
    select distinct on (model_version, sha256) * from lines where grade is not null
    order by model_version, sha256, time desc
)
select model_version, count(*) as photographs, avg(refer::int) as referred,
    quantile_cont(ms, 0.5) as p50_ms, quantile_cont(ms, 0.99) as p99_ms, {grades}
from once group by model_version order by photographs desc
"""
_PAIRS = """
with once as (
    select distinct on (first.model_version, candidate.model_version, sha256) * from lines
    where first is not null and candidate is not null
    order by first.model_version, candidate.model_version, sha256, time desc
)
select first.model_version as first, candidate.model_version as candidate,
    first.grade as first_grade, candidate.grade as candidate_grade, count(*) as photographs,
    sum((first.refer != candidate.refer)::int) as referred_otherwise,
    sum(candidate.expected_severity - first.expected_severity) as severity
from once group by all order by all
"""


def compare(audit: str) -> dict[str, Any]:
    """Compare the models of an audit log: their answers, and those of pairs for the same images.

    Damaged lines are skipped and counted. An image that was sent repeatedly counts once.

    Args:
        audit: Folder of the endpoint's audit log; with several nodes, a folder with copies of all logs.

    Returns:
        `models`, one row per model; `pairs`, one row per compared pair of models, with the 95 % interval of
        their quadratic kappa over images (both None if undefined); `failed`, number of failures of
        candidates; `damaged`, number of unreadable lines.

    Raises:
        UserError: There is no audit log.
    """
    files = storage.join(storage.absolute(audit), "audit-*.jsonl")
    grades = ", ".join(f"avg((grade = {grade})::int) as {name}" for grade, name in enumerate(GRADE_NAMES))
    with open_duckdb() as database:
        try:
            database.execute(_READ, [files])
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            if "No files found" in reason:
                reason = "no audit-*.jsonl"
            raise UserError(
                f"{audit} has no audit log ({reason}); give the folder of scalp serve --audit"
            ) from error
        models = _rows(database, _BY_MODEL.format(grades=grades))
        pairs = _rows(database, _PAIRS)
        (counts,) = _rows(
            database,
            "select count(candidate_error) as failed, count_if(damaged) as damaged from lines",
        )
    comparison = {"models": models, "pairs": _compare_pairs(pairs), **counts}
    _show(comparison)
    return comparison


def _rows(database: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    cursor = database.execute(query)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _compare_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute one row per pair of models from the counts of their grades."""
    pairs = []
    for names in dict.fromkeys((row["first"], row["candidate"]) for row in rows):
        of_pair = [row for row in rows if (row["first"], row["candidate"]) == names]
        matrix = np.zeros((NUM_GRADES, NUM_GRADES), int)
        for row in of_pair:
            matrix[row["first_grade"], row["candidate_grade"]] = row["photographs"]
        total = int(matrix.sum())
        values = {name: value[0] for name, value in metrics.score_confusion(matrix[None]).items()}
        pairs.append(
            {
                "first": names[0],
                "candidate": names[1],
                "photographs": total,
                "same_grade": float(values["top1"]),
                "within_one": float(values["within1"]),
                "kappa": None if np.isnan(values["qwk"]) else float(values["qwk"]),
                "kappa_95": _ends(bootstrap.bootstrap_confusion(matrix)["qwk"]),
                "severity_change": sum(row["severity"] for row in of_pair) / total,
                "referred_otherwise": sum(row["referred_otherwise"] for row in of_pair) / total,
            }
        )
    return pairs


def _ends(interval: dict[str, Any] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval["low"], interval["high"])


def _show(comparison: dict[str, Any]) -> None:
    titles = {"models": "all answers", "pairs": "answers for the same images"}
    for name, title in titles.items():
        rows = comparison[name]
        if rows:
            table = Table(title=title, title_justify="left", title_style="bold")
            for column in rows[0]:
                table.add_column(column.replace("_", " "), overflow="fold")
            for row in rows:
                table.add_row(*(_cell(column, value) for column, value in row.items()))
            console.print(table)
    show("candidate", {"failed": comparison["failed"]})
    if comparison["damaged"]:
        show("audit log", {"damaged lines skipped": comparison["damaged"]})


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return " to ".join(f"{end:.3f}" for end in value)
    if not isinstance(value, float):
        return str(value)
    if name.endswith("_ms"):
        return f"{value:.0f}"
    return f"{value:.3f}" if name in ("kappa", "severity_change") else f"{100 * value:.1f} %"
