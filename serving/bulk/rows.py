"""Result rows of a bulk run by pages and as streams, in bounded memory: files are read a batch at a time."""

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
    """Rows in the order of the files, and the cursor of those that follow; None at the end."""

    rows: list[dict[str, Any]]
    next: str | None


class StoredRows:
    """The rows in a `results` folder. All calls block.

    Args:
        folder: of a run that is gathered; its files stay as they are.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.files = sorted(name for name in storage.names_in(folder) if name.endswith(".parquet"))

    def page(self, limit: int, cursor: str | None) -> Page:
        """The rows after a cursor; the first ones without one.

        Raises:
            Refusal: the cursor was not given out for these rows.
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
        """All rows, `_BATCH_ROWS` at a time."""
        for name in self.files:
            for _, batch in self._read(name):
                yield batch

    def _place(self, cursor: str | None) -> tuple[str, int]:
        if cursor is None:
            return self.files[0], 0
        match = _CURSOR.fullmatch(cursor)
        if match is None or match["file"] not in self.files:
            raise Refusal(422, "bad_cursor", "the cursor is not one of these rows; take `next` of a page")
        return match["file"], int(match["row"])

    def _read(self, name: str, start: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of a file from a row on, each with the number of its first row; skips earlier groups."""
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
                end = first + batch.num_rows
                if end > start:
                    skipped = max(0, start - first)
                    yield first + skipped, batch.slice(skipped)
                first = end


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    with storage.explain_errors(uri), storage.open_file(uri) as data, pq.ParquetFile(data) as file:
        yield file


def streamed(batches: Iterable[pa.RecordBatch], kind: str) -> Iterator[bytes]:
    """Batches as NDJSON, or as CSV with a byte order mark, which spreadsheets need for Korean names."""
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
