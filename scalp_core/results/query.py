"""What `scalp grade` left in a folder, asked by SQL in bounded memory: ten million rows are never loaded.

DuckDB gets the Parquet files from pyarrow, which reaches S3 as everything else here does. It may itself touch
no file but its own spill, so that a query cannot read or write anything beyond the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa

from scalp_core import storage
from scalp_core.datasets import aihub
from scalp_core.errors import UserError
from scalp_core.results.schema import RESULTS_FOLDER, SCHEMA
from scalp_core.storage import parquet
from scalp_core.storage.duckdb_sql import open_duckdb
from scalp_core.storage.outputs import SCRATCH_FOLDER

WORK_FOLDER = f"{SCRATCH_FOLDER}/graded"
"""Below OUT: the rows of a run that is not finished."""

_SUMMARY_FILE = "summary.json"

By = Literal["grade", "folder", "archive", "device", "error", "reason", "day"]
Only = Literal["graded", "failed", "referred"]

_ROWS_A_BATCH = 25_000

# Columns in addition to those of `SCHEMA`: the place of an image, as `locations.Location` writes it, and what
# AI Hub's names say. A view computes only the columns that a query asks for.
_VIEW = f"""
    create view results as
    with named as (
        select *, if(member is null, uri, uri || '!' || member) as location,
            regexp_extract(
                coalesce(member, uri), '(?:^|/){aihub.STEM}\\.[^./]+$', ['site', 'device', 'epoch']
            ) as said
        from stored
    )
    select * exclude (said),
        case
            when member is null then regexp_replace(uri, '/[^/]*$', '')
            when contains(member, '/') then uri || '!' || regexp_replace(member, '/[^/]*$', '')
            else uri
        end as folder,
        if(member is null, null, uri) as archive,
        nullif(said.device, '') as device,
        cast(epoch_ms(try_cast(nullif(said.epoch, '') as bigint)) as date) as day
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
    """Which rows: all conditions hold. `under` is a photograph, a folder, an archive, or `ARCHIVE!FOLDER`."""

    only: Only | None = None
    grade: int | None = None
    under: str | None = None

    @property
    def sql(self) -> str:
        conditions = ["true"]
        if self.only:
            conditions.append("refer" if self.only == "referred" else f"status = '{self.only}'")
        if self.grade is not None:
            conditions.append("grade = $grade")
        if self.under is not None:
            conditions.append(
                "(location = $under or starts_with(location, $under || '/') "
                "or starts_with(location, $under || '!'))"
            )
        return " and ".join(conditions)

    @property
    def parameters(self) -> dict[str, Any]:
        known = {"grade": self.grade, "under": self.under and self.under.rstrip("/")}
        return {name: value for name, value in known.items() if value is not None}


ALL = Selection()


class ResultRows:
    """The rows of one OUT as the view `results`, which has some columns more than `SCHEMA`.

    Raises:
        UserError: nothing is there that `scalp grade` wrote.
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
        """All rows of a short answer."""
        return [row for batch in self.stream(query, **parameters) for row in batch.to_pylist()]

    def stream(self, query: str, **parameters: Any) -> pa.RecordBatchReader:
        """The rows of an answer of any length, in the order of the files where the query asks for none."""
        return self._reader(f"cannot read {self._folder}", query, parameters)

    def run_select(self, query: str) -> pa.RecordBatchReader:
        """The answer to somebody's own query.

        Raises:
            UserError: it is not one `select`, DuckDB refuses it, or it asks for something else than rows.
        """
        with _explained("--sql"):
            statements = self._sql.extract_statements(query)
        if [each.type for each in statements] != [duckdb.StatementType.SELECT]:
            raise UserError("--sql takes one select, for example: select count(*) from results")
        return self._reader("--sql", query, {})

    def _reader(self, doing: str, query: str, parameters: dict[str, Any]) -> pa.RecordBatchReader:
        with _explained(doing):
            reader = self._sql.sql(query, params=parameters).to_arrow_reader(_ROWS_A_BATCH)
        return pa.RecordBatchReader.from_batches(reader.schema, _batches(doing, reader))

    # --- what is commonly asked -----------------------------------------------------------------------------

    def totals(self, selection: Selection = ALL) -> dict[str, Any]:
        """`photographs, graded, failed, referred, mean_severity` of a selection."""
        query = f"select {_TOTALS} from results where {selection.sql}"
        return self.rows(query, **selection.parameters)[0]

    def select_rows(self, selection: Selection = ALL) -> pa.RecordBatchReader:
        """Rows of `SCHEMA`."""
        query = f"select {', '.join(SCHEMA.names)} from results where {selection.sql}"
        return self.stream(query, **selection.parameters).cast(SCHEMA)

    def describe_rows(self, selection: Selection = ALL) -> pa.RecordBatchReader:
        """What a person wants to see of each row."""
        query = f"select {_LISTED} from results where {selection.sql}"
        return self.stream(query, **selection.parameters)

    def totals_by(self, by: By, selection: Selection = ALL) -> pa.RecordBatchReader:
        """Totals by the first column, which has the name `by`, the most photographs first.

        By reason a photograph counts for each that it has. Null is what has none: no device in its name, …
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
        """
        rows = self.rows(query + _limited(limit), **({"prefix": prefix} if value == "top" else {}))
        return {"prefix": prefix, "rows": rows, "values": rows[0]["values"] if rows else 0}

    def _common_folder(self) -> str:
        """The folder, or archive, that all photographs share, with a slash."""
        (ends,) = self.rows(f"select min({_PATH}) as first, max({_PATH}) as last from results")
        # Not commonpath, which makes one slash of the two in s3://; a part that is cut short goes.
        shared = os.path.commonprefix([ends["first"] or "", ends["last"] or ""])  # noqa: RUF071
        return shared.rpartition("/")[0] + "/"

    def failures(self, examples: int) -> list[dict[str, Any]]:
        """`code, photographs, examples` of each error code, the commonest first."""
        return self.rows(
            f"""
            select error_code as code, count(*) as photographs,
                min_by({{'location': location, 'error': error}}, location_id, {int(examples)}) as examples
            from results where status = 'failed' group by code order by photographs desc, code
            """
        )

    def least_sure(self, limit: int) -> list[dict[str, Any]]:
        """Referred photographs, the likeliest grade's probability rising."""
        return self.rows(
            f"""
            select {_CARD} from results where refer
            order by list_max(probabilities), location_id
            """
            + _limited(limit)
        )

    def most_unlike(self, limit: int) -> list[dict[str, Any]]:
        """Photographs above 1 in `unlikeness`, which falls."""
        return self.rows(
            f"select {_CARD} from results where unlikeness > 1 order by unlikeness desc, location_id"
            + _limited(limit)
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
# The first folder below the one that all share; what lies beside such folders has none.
_TOP = f"nullif(regexp_extract(substr({_PATH}, length($prefix) + 1), '^([^/]+)/', 1), '')"


def _find(out: str) -> tuple[bool, str, list[str]]:
    """Whether the run is finished, the folder of its rows, and the files in it."""
    results, work = storage.join(out, RESULTS_FOLDER), storage.join(out, WORK_FOLDER)
    summary = storage.join(out, _SUMMARY_FILE)
    finished = storage.exists(summary) and not json.loads(storage.read(summary)).get("rows_unaccounted")
    # Until the summary is there, the results may be half of what the work is.
    for folder in (results, work) if finished else (work, results):
        if files := _parquet_below(folder):
            return finished and folder == results, folder, files
    if storage.exists(storage.join(out, "run.json")):
        raise UserError(f"{out} has no row yet; run the same scalp grade command to go on, and ask again")
    raise UserError(
        f"{out} has no {RESULTS_FOLDER}/*.parquet; give the OUT of scalp grade, or make it with: "
        f"scalp grade BUNDLE SOURCE {out}"
    )


def _parquet_below(folder: str) -> list[str]:
    """The rows of a run that is not finished lie in groups; before its first one there is no folder."""
    if storage.is_empty(folder):
        return []
    return [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        # As an error of storage, so that whoever waits for storage can tell.
        raise UserError(f"{doing}: {_line(error)}") from OSError(str(error))


def _batches(doing: str, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with _explained(doing):
        yield from reader


def _limited(limit: int) -> str:
    return f" limit {int(limit)}"


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
