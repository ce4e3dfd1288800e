"""`scalp compare`: what two bundles said of the photographs that an endpoint was asked about."""

from __future__ import annotations

from typing import Any

import duckdb
from rich.table import Table
from sklearn.metrics import cohen_kappa_score

from jobs.console import console, show
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES, NUM_GRADES
from scalp_core.sql import spilling

# Columns that a log without such lines would lack.
_COLUMNS = (
    "{sha256: 'VARCHAR', model_version: 'VARCHAR', grade: 'INTEGER', refer: 'BOOLEAN', ms: 'DOUBLE', "
    "candidate_error: 'VARCHAR', first: 'STRUCT({one})', candidate: 'STRUCT({one})'}"
).replace(
    "{one}",
    "model_version VARCHAR, grade INTEGER, expected_severity DOUBLE, refer BOOLEAN, forward_ms DOUBLE",
)
_READ = f"create table lines as select * from read_json(?, format='newline_delimited', columns={_COLUMNS})"  # noqa: S608
_BY_MODEL = """
select model_version, count(*) as photographs, avg(refer::int) as referred,
    quantile_cont(ms, 0.5) as p50_ms, quantile_cont(ms, 0.99) as p99_ms, {grades}
from lines where grade is not null group by model_version order by photographs desc
"""
_PAIRS = """
select first.model_version as first, candidate.model_version as candidate,
    first.grade as first_grade, candidate.grade as candidate_grade, count(*) as photographs,
    sum((first.refer != candidate.refer)::int) as referred_otherwise,
    sum(candidate.expected_severity - first.expected_severity) as severity
from lines where first is not null and candidate is not null
group by all order by all
"""


def compare(audit: str) -> dict[str, Any]:
    """Compares the models of an audit log: what each answered, and what both said of the same photographs.

    Args:
        audit: folder of the endpoint's audit log; of several nodes, one that all were copied to.

    Returns:
        `models`, a row for each that answered; `pairs`, one for each two that were compared; `failed`, how
        often a candidate did.

    Raises:
        UserError: there is no audit log.
    """
    files = storage.join(storage.absolute(audit), "audit-*.jsonl")
    grades = ", ".join(f"avg((grade = {grade})::int) as {name}" for grade, name in enumerate(GRADE_NAMES))
    with spilling() as database:
        try:
            database.execute(_READ, [files])
        except duckdb.Error as error:
            raise UserError(
                f"{audit} holds no audit log ({str(error).splitlines()[0]}); give the folder of scalp serve "
                "--audit"
            ) from error
        models = _rows(database, _BY_MODEL.format(grades=grades))
        pairs = _rows(database, _PAIRS)
        (failed,) = _rows(database, "select count(candidate_error) as photographs from lines")
    found = {"models": models, "pairs": _pairs(pairs), "failed": failed["photographs"]}
    _show(found)
    return found


def _rows(database: duckdb.DuckDBPyConnection, question: str) -> list[dict[str, Any]]:
    answer = database.execute(question)
    names = [column[0] for column in answer.description or ()]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From counts of grades that met, one row for each two models."""
    found = []
    for names in dict.fromkeys((row["first"], row["candidate"]) for row in rows):
        met = [row for row in rows if (row["first"], row["candidate"]) == names]
        counts = [row["photographs"] for row in met]
        total = sum(counts)
        first = [row["first_grade"] for row in met]
        second = [row["candidate_grade"] for row in met]
        apart = [abs(one - other) for one, other in zip(first, second, strict=True)]
        kappa = cohen_kappa_score(
            first, second, labels=list(range(NUM_GRADES)), weights="quadratic", sample_weight=counts
        )
        found.append(
            {
                "first": names[0],
                "candidate": names[1],
                "photographs": total,
                "same_grade": sum(n for n, d in zip(counts, apart, strict=True) if d == 0) / total,
                "within_one": sum(n for n, d in zip(counts, apart, strict=True) if d <= 1) / total,
                "kappa": float(kappa),
                "severity_change": sum(row["severity"] for row in met) / total,
                "referred_otherwise": sum(row["referred_otherwise"] for row in met) / total,
            }
        )
    return found


def _show(found: dict[str, Any]) -> None:
    for title, rows in (("what each answered", found["models"]), ("of the same photographs", found["pairs"])):
        if rows:
            table = Table(title=title, title_justify="left", title_style="bold")
            for name in rows[0]:
                table.add_column(name.replace("_", " "), overflow="fold")
            for row in rows:
                table.add_row(*(_cell(name, value) for name, value in row.items()))
            console.print(table)
    show("candidate", {"failed": found["failed"]})


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name.endswith("_ms"):
        return f"{value:.0f}"
    return f"{value:.3f}" if name in ("kappa", "severity_change") else f"{100 * value:.1f} %"
