"""DuckDB for questions to more rows than fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import duckdb

_MEMORY = "512MB"
_THREADS = 2


@contextmanager
def spilling(**settings: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database of its own that takes 512 MB of memory and then spills to a temporary folder.

    Args:
        settings: more of DuckDB's.
    """
    with TemporaryDirectory(prefix="scalp-sql-") as folder:
        bounds: dict[str, Any] = {"memory_limit": _MEMORY, "threads": _THREADS, "temp_directory": folder}
        with duckdb.connect(config=bounds | settings) as connection:
            yield connection
