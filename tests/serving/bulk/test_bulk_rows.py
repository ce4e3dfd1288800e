"""Rows of bulk runs as pages and streams."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from scalp_core.results.schema import SCHEMA
from serving.bulk.rows import CSV, NDJSON, StoredRows, encode_rows
from tests.support.result_rows import failed, row


def test_rows_of_an_earlier_version_get_the_columns_that_they_lack(tmp_path):
    rows = [row("/data/a.jpg"), failed("/data/b.jpg", "empty")]
    table = pa.Table.from_pylist(rows, schema=SCHEMA).drop_columns(["other_symptoms"])
    pq.write_table(table, tmp_path / "part-0.parquet")
    stored = StoredRows(str(tmp_path))
    lines = b"".join(encode_rows(stored.batches(), NDJSON)).splitlines()
    assert [list(json.loads(line)) for line in lines] == [SCHEMA.names] * 2
    header, *_ = b"".join(encode_rows(stored.batches(), CSV)).decode("utf-8-sig").splitlines()
    assert [name.strip('"') for name in header.split(",")] == SCHEMA.names
    assert stored.page(1, None).rows[0]["other_symptoms"] is None
