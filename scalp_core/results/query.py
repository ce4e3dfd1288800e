"""SQL queries of result rows by DuckDB, in bounded memory.

DuckDB reads the Parquet files through pyarrow, which accesses S3 like the rest of scalp. DuckDB itself may
access only its spill files, so a query cannot read or write anything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa

from scalp_core import storage
from scalp_core.datasets import aihub
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.results.progress import SUMMARY_FILE
from scalp_core.results.schema import RESULTS_FOLDER, SCHEMA
from scalp_core.results.store import is_store
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import first_line, open_duckdb
from scalp_core.storage.outputs import SCRATCH_FOLDER

WORK_FOLDER = f"{SCRATCH_FOLDER}/graded"
"""Folder below the output directory with the rows of an unfinished run."""


By = Literal["grade", "folder", "archive", "device", "error", "reason", "day"]
Status = Literal["graded", "failed", "referred"]

_ROWS_PER_BATCH = 25_000

# Columns in addition to those of `SCHEMA`: the location of an image, in the format of `locations.Location`,
# and fields of AI Hub's file names. A view computes only the columns that a query uses.
_VIEW = f"""
    create view results as
    with named as (
        select *, if(member is null, uri, uri || '!' || member) as location,
            regexp_extract(
                coalesce(member, uri), '(?:^|/){aihub.STEM}\\.[^./]+$', ['site', 'device', 'epoch']
            ) as parsed_name
        from stored
    )
    select * exclude (parsed_name),
        case
            when member is null then regexp_replace(uri, '/[^/]*$', '')
            when contains(member, '/') then uri || '!' || regexp_replace(member, '/[^/]*$', '')
            else uri
        end as folder,
        if(member is null, null, uri) as archive,
        nullif(parsed_name.device, '') as device,
        cast(epoch_ms(try_cast(nullif(parsed_name.epoch, '') as bigint)) as date) as day
    from named
"""

_TOTALS = """
    count(*) as photographs,
    count(*) filter (status = 'graded') as graded,
    count(*) filter (status = 'failed') as failed,
    count(*) filter (refer) as referred,
    avg(expected_severity) as mean_severity
"""
_BY: dict[By, str] = {
    "grade": "if(grade is null, null, grade || ' ' || grade_name)",
    "folder": "folder",
    "archive": "archive",
    "device": "device",
    "error": "error_code",
    "reason": "unnest(refer_reasons)",
    "day": "day",
}


@dataclass(frozen=True)
class Selection:
    """Rows by all conditions; `path_prefix` is an image, folder, archive or `ARCHIVE!FOLDER`."""

    status: Status | None = None
    grade: int | None = None
    path_prefix: str | None = None

    @property
    def sql(self) -> str:
        """SQL condition with placeholders for `parameters`."""
        conditions = ["true"]
        if self.status:
            conditions.append("refer" if self.status == "referred" else f"status = '{self.status}'")
        if self.grade is not None:
            conditions.append("grade = $grade")
        if self.path_prefix is not None:
            conditions.append(
                "(location = $path_prefix or starts_with(location, $path_prefix || '/') "
                "or starts_with(location, $path_prefix || '!'))"
            )
        return " and ".join(conditions)

    @property
    def parameters(self) -> dict[str, Any]:
        """Values of the placeholders in `sql`."""
        known = {"grade": self.grade, "path_prefix": self.path_prefix and self.path_prefix.rstrip("/")}
        return {name: value for name, value in known.items() if value is not None}


ALL = Selection()
_SQL_EXAMPLE = (
    "write one select of the columns in docs/formats.md, for example: select grade, count(*) from results "
    "group by grade"
)


class ResultRows:
    """The result rows of an output directory, as the view `results`: `SCHEMA` and additional columns.

    Raises:
        UserError: The directory has no results of `scalp grade`.
    """

    def __init__(self, out: str) -> None:
        self.out = storage.absolute(out)
        self.finished, self._folder, files = _find(self.out)
        stored = parquet.dataset(files, schema=SCHEMA)
        self._open = ExitStack()
        self._sql = self._open.enter_context(open_duckdb(python_enable_replacements=False))
        self._sql.register("stored", stored)
        self._sql.execute(_VIEW)
        self._sql.execute("set enable_external_access = false")
        self._sql.execute("set lock_configuration = true")

    def __enter__(self) -> ResultRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def rows(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        """Run a query and return all rows; for short results."""
        return [row for batch in self.stream(query, **parameters) for row in batch.to_pylist()]

    def stream(self, query: str, **parameters: Any) -> pa.RecordBatchReader:
        """Run a query and stream its rows, in the order of the files unless the query sorts them."""
        return self._reader(f"cannot read {self._folder}", query, parameters)

    def run_select(self, query: str) -> pa.RecordBatchReader:
        """Run a user's query.

        Raises:
            UserError: It is not a single `select`, or DuckDB rejects it.
        """
        with _as_user_error("--sql"):
            statements = self._sql.extract_statements(query)
        if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
            raise UserError(f"--sql has several statements, or another one than select; {_SQL_EXAMPLE}")
        return self._reader("--sql", query, {})

    def _reader(self, action: str, query: str, parameters: dict[str, Any]) -> pa.RecordBatchReader:
        with _as_user_error(action):
            reader = self._sql.sql(query, params=parameters).to_arrow_reader(_ROWS_PER_BATCH)
        return pa.RecordBatchReader.from_batches(reader.schema, _batches(action, reader))

    # --- common queries -------------------------------------------------------------------------------------

    def totals(self, selection: Selection = ALL) -> dict[str, Any]:
        """Compute `photographs, graded, failed, referred, mean_severity` of a selection."""
        query = f"select {_TOTALS} from results where {selection.sql}"
        return self.rows(query, **selection.parameters)[0]

    def select_rows(self, selection: Selection = ALL) -> pa.RecordBatchReader:
        """Stream the rows of a selection with the columns of `SCHEMA`."""
        query = f"select {', '.join(SCHEMA.names)} from results where {selection.sql}"
        return self.stream(query, **selection.parameters).cast(SCHEMA)

    def describe_rows(self, selection: Selection = ALL) -> pa.RecordBatchReader:
        """Stream the rows of a selection with the columns for display."""
        query = f"select {_LISTED} from results where {selection.sql}"
        return self.stream(query, **selection.parameters)

    def totals_by(self, by: By, selection: Selection = ALL) -> pa.RecordBatchReader:
        """Compute totals grouped by the column `by`, the largest group first.

        With `reason`, an image counts once per reason. Null stands for images without a value.
        """
        order = "value nulls last" if by in ("grade", "day") else "photographs desc, value nulls last"
        query = f"""
            with chosen as (select {_BY[by]} as value, * from results where {selection.sql})
            select value as "{by}", {_TOTALS} from chosen group by value order by {order}
        """
        return self.stream(query, **selection.parameters)

    def slices(self, value: str, names: tuple[str, ...], limit: int) -> dict[str, Any]:
        """Totals as in `totals_by`, by a column or by `top`, with the number of images of each grade.

        `top` is the first folder or archive below the `prefix` that all images share. `values` counts the
        different values, including those above `limit`.
        """
        mix = ", ".join(f"count(*) filter (grade = {grade})" for grade in range(len(names)))
        prefix = self._common_folder() if value == "top" else ""
        query = f"""
            with chosen as (
                select {_TOP if value == "top" else value} as value, * from results
            )
            select value, {_TOTALS}, [{mix}] as by_grade, count(*) over () as values
            from chosen group by value order by photographs desc, value nulls last
            limit {int(limit)}
        """
        rows = self.rows(query, **({"prefix": prefix} if value == "top" else {}))
        return {"prefix": prefix, "rows": rows, "values": rows[0]["values"] if rows else 0}

    def _common_folder(self) -> str:
        """Find the deepest folder or archive that contains all images, with a trailing slash."""
        (ends,) = self.rows(f"select min({_PATH}) as first, max({_PATH}) as last from results")
        # Not commonpath, which merges the two slashes of s3://; the incomplete last component is removed.
        shared = os.path.commonprefix([ends["first"] or "", ends["last"] or ""])  # noqa: RUF071
        return shared.rpartition("/")[0] + "/"

    def count_other_symptoms(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Count the images of each grade of the other symptoms that the model grades, by name."""
        if not names:
            return {}
        column = "other_symptoms.{name}.grade"
        counts = [
            ", ".join(
                f"count(*) filter ({column.format(name=name)} = {grade})" for grade in range(NUM_GRADES)
            )
            for name in names
        ]
        (row,) = self.rows(f"select {', '.join(f'[{of_name}]' for of_name in counts)} from results")
        return dict(zip(names, row.values(), strict=True))

    def failures(self, examples: int) -> list[dict[str, Any]]:
        """List `code, photographs, examples` per error code, the most frequent first."""
        return self.rows(
            f"""
            select error_code as code, count(*) as photographs,
                min_by({{'location': location, 'error': error}}, location_id, {int(examples)}) as examples
            from results where status = 'failed' group by code order by photographs desc, code
            """
        )

    def least_sure(self, limit: int) -> list[dict[str, Any]]:
        """List referred images by the probability of their likeliest grade, ascending."""
        return self.rows(
            f"""
            select {_CARD} from results where refer
            order by list_max(probabilities), location_id
            limit {int(limit)}
            """
        )

    def most_unlike(self, limit: int) -> list[dict[str, Any]]:
        """List images with an `unlikeness` above 1, descending."""
        return self.rows(
            f"""
            select {_CARD} from results where unlikeness > 1
            order by unlikeness desc, location_id
            limit {int(limit)}
            """
        )


_LISTED = """
    location, if(status = 'failed', status, grade || ' ' || grade_name) as grade,
    list_max(probabilities) as probability, expected_severity as severity,
    if(status = 'failed', error_code || ': ' || error, array_to_string(refer_reasons, ', ')) as why
"""
_PATH = "concat_ws('/', uri, member)"
_CARD = """
    location_id, uri, member, location, grade, probabilities, expected_severity, unlikeness, refer_reasons
"""
# First folder below the shared prefix; null for files directly in the prefix.
_TOP = f"nullif(regexp_extract(substr({_PATH}, length($prefix) + 1), '^([^/]+)/', 1), '')"


def _find(out: str) -> tuple[bool, str, list[str]]:
    """Find the rows of a run: whether it is finished, the folder of the rows, and the files in it."""
    results, work = storage.join(out, RESULTS_FOLDER), storage.join(out, WORK_FOLDER)
    summary = storage.read_json(storage.join(out, SUMMARY_FILE))
    finished = summary is not None and not summary.get("rows_unaccounted")
    # Without a summary, the results folder may be less complete than the work folder.
    for folder in (results, work) if finished else (work, results):
        if files := _parquet_below(folder):
            return finished and folder == results, folder, files
    if is_store(out):
        raise UserError(f"{out} has no image yet; clients of the endpoint add one with keep=true")
    if storage.exists(storage.join(out, "run.json")):
        raise UserError(f"{out} has no rows yet; run the same scalp grade command to resume, then try again")
    raise UserError(
        f"{out} has no {RESULTS_FOLDER}/*.parquet; give the OUT of scalp grade, or create it with: "
        f"scalp grade BUNDLE SOURCE {out}"
    )


def _parquet_below(folder: str) -> list[str]:
    """List the Parquet files in all subfolders; none if the folder does not exist."""
    if storage.is_empty(folder):
        return []
    return [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]


@contextmanager
def _as_user_error(action: str) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        fix = f"; {_SQL_EXAMPLE}" if isinstance(error, duckdb.ProgrammingError) else ""
        # With an OSError as its cause, so that callers recognize an error of storage.
        raise UserError(f"{action}: {first_line(error)}{fix}") from OSError(str(error))


def _batches(action: str, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _as_user_error(action):
        yield from reader
