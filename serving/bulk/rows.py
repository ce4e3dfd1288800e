"""Result rows of a bulk run as pages and streams, in bounded memory: files are read in batches."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from scalp_core import storage
from scalp_core.results.formats import flat_batch, flat_schema, json_lines
from scalp_core.results.schema import SCHEMA
from serving.http.problems import Refusal

NDJSON, CSV = "application/x-ndjson", "text/csv"

_CURSOR = re.compile(r"(?P<file>part-[\w-]{1,100}\.parquet)\.(?P<row>\d{1,9})", re.ASCII)
_BATCH_ROWS = 1_000


class Page(NamedTuple):
    """One page of rows in the order of the files, and the cursor of the next page; None at the end."""

    rows: list[dict[str, Any]]
    next: str | None


class StoredRows:
    """Rows in the `results` folder of a finished run. All methods block.

    Args:
        folder: The `results` folder, whose files no longer change.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.files = sorted(name for name in storage.names_in(folder) if name.endswith(".parquet"))

    def page(self, limit: int, cursor: str | None) -> Page:
        """Read the page after a cursor; the first page without one.

        Raises:
            Refusal: The cursor does not belong to these rows (422).
        """
        name, start = self._place(cursor)
        rows: list[dict[str, Any]] = []
        for file in self.files[self.files.index(name) :]:
            for first, batch in self._read(file, start):
                taken = batch.slice(0, limit - len(rows))
                rows += taken.to_pylist()
                if taken.num_rows < batch.num_rows:
                    return Page(rows, f"{file}.{first + taken.num_rows}")
            start = 0
        return Page(rows, None)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in batches of at most `_BATCH_ROWS`."""
        for name in self.files:
            for _, batch in self._read(name):
                yield batch

    def _place(self, cursor: str | None) -> tuple[str, int]:
        if cursor is None:
            return self.files[0], 0
        match = _CURSOR.fullmatch(cursor)
        if match is None or match["file"] not in self.files:
            raise Refusal(422, "bad_cursor", "the cursor does not belong to these rows; use `next` of a page")
        return match["file"], int(match["row"])

    def _read(self, name: str, start: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield batches of a file from row `start`, each with its first row's number; skip earlier groups."""
        with _opened(storage.join(self._folder, name)) as file:
            groups: list[int] = []
            first = 0
            for number in range(file.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                if groups or first + rows > start:
                    groups.append(number)
                else:
                    first += rows
            for batch in file.iter_batches(_BATCH_ROWS, groups, SCHEMA.names):
                for column in SCHEMA.names:  # of a run by an earlier version of scalp
                    if column not in batch.schema.names:
                        batch = batch.append_column(
                            column, pa.nulls(batch.num_rows, SCHEMA.field(column).type)
                        )
                batch = batch.select(SCHEMA.names)
                end = first + batch.num_rows
                if end > start:
                    skipped = max(0, start - first)
                    yield first + skipped, batch.slice(skipped)
                first = end


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    with storage.explain_errors(uri), storage.open_file(uri) as data, pq.ParquetFile(data) as file:
        yield file


def encode_rows(batches: Iterable[pa.RecordBatch], kind: str) -> Iterator[bytes]:
    """Encode batches as NDJSON, or as CSV with the byte order mark that spreadsheets need for Korean."""
    if kind == NDJSON:
        yield from map(json_lines, batches)
        return
    out = io.BytesIO()
    out.write(b"\xef\xbb\xbf")
    with pacsv.CSVWriter(out, flat_schema(SCHEMA)) as writer:
        for batch in batches:
            writer.write_batch(flat_batch(batch))
            yield out.getvalue()
            out.seek(0)
            out.truncate()
    if rest := out.getvalue():
        yield rest
