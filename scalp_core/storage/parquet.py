"""Parquet files by uri, local or `s3://`: read and write tables, streams and datasets."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import s3

if TYPE_CHECKING:
    import pyarrow.dataset as pads


def write(uri: str, table: pa.Table) -> None:
    """Atomically write a table as one Parquet file."""
    storage.write(uri, _encode(table))


def create(uri: str, table: pa.Table) -> bool:
    """Atomically write a table as one Parquet file unless it exists; as `storage.create`."""
    return storage.create(uri, _encode(table))


def _encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_batches(uri: str, batches: pa.RecordBatchReader) -> None:
    """Atomically write a stream of record batches as one Parquet file, in constant memory."""
    with storage.new_file(uri) as file, pq.ParquetWriter(file, batches.schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def dataset(place: str | list[str], **options: Any) -> pads.Dataset:
    """Open a dataset of Parquet files, in a folder or listed, that queries read as they run.

    A query cannot be resumed, so the S3 client itself retries while the server is unavailable.
    """
    import pyarrow.dataset as pads

    uris = [place] if isinstance(place, str) else place
    fs, _ = storage.filesystem(uris[0])
    if storage.is_s3(uris[0]):
        fs = s3.filesystem(long_retries=True)
    paths = [storage.filesystem(uri)[1] for uri in uris]
    source = paths[0] if isinstance(place, str) else paths
    with storage.explain_errors(uris[0]):
        return pads.dataset(source, filesystem=fs, format="parquet", **options)


def open_in_memory(uri: str) -> pq.ParquetFile:
    """Read the bytes of one Parquet file, to decode parts of it.

    Raises:
        UserError: the file is missing, or not a valid Parquet file.
    """
    try:
        return pq.ParquetFile(io.BytesIO(storage.read(uri)))
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} is not a valid Parquet file ({error}); create it again") from error


def read(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file as a table.

    Raises:
        UserError: the file is missing, or not a valid Parquet file.
    """
    return open_in_memory(uri).read(columns)
