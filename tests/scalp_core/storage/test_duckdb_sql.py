"""Errors of queries that need more memory or disk than the node has."""

import duckdb
import pytest

from scalp_core.errors import UserError
from scalp_core.storage.duckdb_sql import open_duckdb


def test_too_little_memory_is_a_users_error_with_a_way_out():
    with (
        pytest.raises(UserError, match="more than 16 MiB of memory .*TMPDIR"),
        open_duckdb(16, 1, max_temp_directory_size="1MB") as sql,
    ):
        sql.execute("select list(md5(range::varchar)) from range(2000000)").fetchone()


def test_a_mistake_in_a_query_stays_one():
    with pytest.raises(duckdb.CatalogException), open_duckdb() as sql:
        sql.execute("select * from nothing")
