"""DuckDB for queries over more rows than fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import psutil

from scalp_core.errors import UserError

_MIB = 2**20
_MEMORY_MIB = 512
_THREADS = 2


@contextmanager
def open_duckdb(memory_mib: int = _MEMORY_MIB, threads: int = _THREADS, **settings: Any) -> Iterator[Any]:
    """Open a separate in-memory DuckDB that spills to the temporary folder beyond a memory limit.

    `settings` are further settings of DuckDB.

    Raises:
        UserError: a query inside the block needed more memory or disk.
    """
    with TemporaryDirectory(prefix="scalp-sql-") as folder:
        settings |= {"memory_limit": f"{memory_mib}MiB", "threads": threads, "temp_directory": folder}
        place = Path(folder).parent
        try:
            with duckdb.connect(config=settings) as connection:
                connection.execute("set enable_progress_bar = false")
                yield connection
        except duckdb.OutOfMemoryException as error:
            free_mib = psutil.disk_usage(folder).free // _MIB
            raise UserError(
                f"a query needs more than {memory_mib:,} MiB of memory and {free_mib:,} MiB in {place} "
                f"({first_line(error)}); use a node with more memory, or set TMPDIR to a larger disk"
            ) from error
        except duckdb.IOException as error:
            raise UserError(
                f"a query cannot use its temporary files in {place} ({first_line(error)}); "
                "free disk space there, or set TMPDIR to a larger disk"
            ) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
