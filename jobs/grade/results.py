"""`scalp results`: query the rows of `scalp grade`; print a table, or export a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.common.console import console, print_json, show
from jobs.common.errors import printable
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.results.documents import DOCUMENTS_FOLDER, SUFFIXES, Document, export_documents
from scalp_core.results.formats import flat_batch, flat_schema, json_lines, json_text
from scalp_core.results.query import ALL, WORK_FOLDER, By, ResultRows, Selection
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.results.store import is_store

Batches = Iterator[pa.RecordBatch]

_SHOWN = 50
# Output to a pipe has one line per row, for grep.
_PIPE = Console(width=10_000)


def results(
    out: str,
    selection: Selection = ALL,
    by: By | None = None,
    sql: str | None = None,
    limit: int | None = None,
    to: str | None = None,
    overwrite: bool = False,
    as_json: bool = False,
    write: Document | None = None,
    patients: bool = False,
) -> int:
    """Query the rows of a run, finished or not: counts, the result of a query, or rows; else an overview.

    Args:
        out: Output directory of `scalp grade`.
        selection: Rows to select.
        by: Column whose values are counted.
        sql: Query of a user.
        limit: Maximum number of lines; default: 50 on the terminal, all in a file.
        to: File to write.
        overwrite: Whether to replace an existing file.
        as_json: Whether to print one JSON document, with all columns of selected rows.
        write: Kind of clinical documents to write to `to`, one per row.
        patients: Whether documents name the patient and study of DICOM files, which are read again.

    Returns:
        Number of lines that were printed or written.

    Raises:
        UserError: There are no results, options contradict each other, or no row is selected.
    """
    if sql is not None and (by or selection != ALL):
        raise UserError("--sql selects the rows itself; omit --by, --status, --grade and --path-prefix")
    if to is not None and as_json:
        raise UserError("--json prints the rows, and --output writes them; give one of the two")
    if patients and write is None:
        raise UserError("--patients is for documents; add --write fhir or --write dicom-sr")
    if write is not None and (to is None or by or sql is not None):
        raise UserError(
            f"--write {write} writes one document per row; name its file with --output "
            f"FILE{SUFFIXES[write]}, and omit --by and --sql"
        )
    if to is not None:
        _check_file(to, storage.absolute(out), overwrite, [SUFFIXES[write]] if write else list(_WRITERS))
    with ResultRows(out) as graded:
        grows = is_store(out)
        if not graded.finished and not grows:
            _say(f"{out} is not finished: these are its rows so far; the same scalp grade command resumes it")
        if sql is not None:
            answer = graded.run_select(sql)
        elif selection == ALL and not by and not to and limit is None:
            return _overview(graded, as_json)
        elif not graded.totals(selection)["photographs"]:
            raise UserError(
                f"{out} has no row with {_conditions(selection)}; scalp results {out} shows what it has"
            )
        elif by:
            answer = graded.totals_by(by, selection)
        else:
            answer = graded.select_rows(selection) if to or as_json else graded.describe_rows(selection)
        if write is not None and to is not None:
            if grows:
                # Its rows may be of several models, and do not say which are of synthetic images.
                raise UserError(f"{out} is a store of the endpoint; --write reads the OUT of scalp grade")
            if not graded.finished:
                raise UserError(f"{out} is not finished; finish it with the same scalp grade command first")
            batches = answer if limit is None else _first(answer, limit)
            documents = export_documents(write, graded.out, batches, storage.absolute(to), patients)
            _say(f"{documents:,} documents are in {storage.absolute(to)}")
            return documents
        if as_json:
            return _print_rows(answer, limit)
        return _export(answer, storage.absolute(to), limit) if to else _show(answer, limit or _SHOWN)


def parse_path_prefix(text: str) -> str:
    """Parse a folder, prefix, ARCHIVE or ARCHIVE!FOLDER to the form in the rows: absolute local paths."""
    return storage.absolute(text)


def _check_file(to: str, out: str, overwrite: bool, suffixes: list[str]) -> None:
    if _suffix(to) not in suffixes:
        raise UserError(
            f"--output {to} has an unknown ending; name a file that ends in {', '.join(suffixes)}"
        )
    protected = [storage.join(out, folder) for folder in (RESULTS_FOLDER, WORK_FOLDER, DOCUMENTS_FOLDER)]
    if any(storage.absolute(to).startswith(f"{folder}/") for folder in protected):
        raise UserError(f"--output {to} is in a folder of the run's own files; choose another folder")
    if not overwrite and storage.exists(to):
        raise UserError(f"--output {to}: the file exists; name a new one, or add --overwrite")


def _conditions(selection: Selection) -> str:
    return ", ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(selection).items() if value is not None
    )


# --- print -------------------------------------------------------------------------------------------------


def _overview(graded: ResultRows, as_json: bool) -> int:
    totals = graded.totals()
    counts = {
        name: {
            row[name]: row["photographs"] for row in graded.totals_by(name, selection).read_all().to_pylist()
        }
        for name, selection in _OVERVIEW.items()
    }
    severity = totals["mean_severity"]
    rows = {
        "rows": totals["photographs"],
        "graded": totals["graded"],
        "by grade": counts["grade"],
        "mean severity": severity,
        "referred": totals["referred"],
        "by reason": counts["reason"],
        "failed": totals["failed"],
        "by error": counts["error"],
    }
    if as_json:
        named = {name.replace(" ", "_"): value for name, value in rows.items()}
        print_json({"finished": graded.finished, **named})
    else:
        show("results", rows | {"mean severity": "" if severity is None else severity})
    return len(rows)


_OVERVIEW: dict[By, Selection] = {
    "grade": Selection(status="graded"),
    "reason": Selection(status="referred"),
    "error": Selection(status="failed"),
}


def _print_rows(answer: pa.RecordBatchReader, limit: int | None) -> int:
    """Print a JSON list with one row per line, without holding all rows in memory."""
    rows = 0
    sys.stdout.write("[")
    for batch in answer if limit is None else _first(answer, limit):
        for row in batch.to_pylist():
            sys.stdout.write(f"{',' * bool(rows)}\n{json_text(row)}")
            rows += 1
    sys.stdout.write("\n]\n")
    return rows


def _show(answer: pa.RecordBatchReader, limit: int) -> int:
    """Print the first lines, and whether there are more; file names are not read as markup."""
    lines = [line for batch in _first(answer, limit + 1) for line in batch.to_pylist()]
    table = Table()
    for field in answer.schema:
        is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        heading = printable(field.name.replace("_", " "))
        table.add_column(heading, overflow="fold", justify="right" if is_number else "left")
    for line in lines[:limit]:
        table.add_row(*(Text(_text(value)) for value in line.values()))
    (console if console.is_terminal else _PIPE).print(table)
    if len(lines) > limit:
        _say(f"and more; --limit N shows N lines, --output FILE{'|'.join(_WRITERS)} writes all")
    return min(len(lines), limit)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return printable(str(value))


def _say(line: str) -> None:
    console.print(printable(line))


# --- write -------------------------------------------------------------------------------------------------


def _export(answer: pa.RecordBatchReader, uri: str, limit: int | None) -> int:
    batches = _Counted(answer, limit)
    with storage.new_file(uri) as file:
        _WRITERS[_suffix(uri)](iter(batches), answer.schema, file)
    _say(f"{batches.rows:,} rows are in {uri}")
    return batches.rows


class _Counted:
    """Batches of an answer up to a limit, and the number of their rows that were read."""

    def __init__(self, answer: pa.RecordBatchReader, limit: int | None) -> None:
        self._batches = answer if limit is None else _first(answer, limit)
        self.rows = 0

    def __iter__(self) -> Batches:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


def _first(batches: Batches, limit: int) -> Batches:
    for batch in batches:
        yield batch.slice(0, limit)
        limit -= batch.num_rows
        if limit <= 0:
            return


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _write_parquet(batches: Batches, schema: pa.Schema, file: pa.NativeFile) -> None:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_jsonl(batches: Batches, _schema: pa.Schema, file: pa.NativeFile) -> None:
    for batch in batches:
        file.write(json_lines(batch))


def _write_csv(batches: Batches, schema: pa.Schema, file: pa.NativeFile) -> None:
    try:
        with pacsv.CSVWriter(file, flat_schema(schema)) as writer:
            for batch in batches:
                writer.write_batch(flat_batch(batch))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise UserError(f"a .csv cannot hold these columns ({error}); use .jsonl or .parquet") from None


_WRITERS: dict[str, Callable[[Batches, pa.Schema, pa.NativeFile], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
