"""Rows of bulk runs as pages and streams."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalp_core.results.schema import SCHEMA
from serving.auth.scopes import Caller, Rights
from serving.bulk.rows import CSV, NDJSON, StoredRows, encode_rows
from serving.bulk.work import Bulk
from serving.http.problems import Refusal
from serving.schemas.bulk import BulkSettings
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


def test_rows_that_are_gathered_while_others_are_graded_are_not_served(tmp_path):
    work, key = f"bulk-{'0' * 20}", Caller(None, Rights(admin=True))
    bulk = Bulk(BulkSettings(sources=("s3://clinic",), out=str(tmp_path)), None)
    results = tmp_path / work / "results"
    results.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row("/data/a.jpg")], schema=SCHEMA), results / "part-0.parquet")
    with pytest.raises(Refusal) as refused:
        bulk.files(key, work)
    assert refused.value.code == "no_results_yet"
    (tmp_path / work / "summary.json").write_text("{}")
    assert bulk.files(key, work).files == ["results/part-0.parquet"]
