"""Isolate native crashes: run a call in a child process, and count tries that ended their process.

A decoder that crashes its process costs one image, not its shard: after `MOST_TRIES` such tries, the images
of a shard are decoded in a child process.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from scalp_core import storage
from scalp_core.errors import IMAGE_CODES, ImageError, UserError

MOST_TRIES = 3

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Isolation:
    """Spawned child process for calls that may crash; started by the first call, and again after a crash.

    Functions, arguments and results are pickled. Threads may share it; calls run one at a time.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()
            self._pool = None

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return `function(*arguments)`, computed in the child process.

        Raises:
            ImageError: The child process crashed; code `crashed`.
            Exception: The function raised it.
        """
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            try:
                return self._pool.submit(function, *arguments).result()
            except BrokenProcessPool:
                self._pool.shutdown()
                self._pool = None
                raise ImageError("crashed", IMAGE_CODES["crashed"]) from None


@contextmanager
def counted_try(folder: str) -> Iterator[bool]:
    """Keep a mark in `folder` while the block runs; a process that dies inside it leaves its mark.

    Yields:
        Whether `MOST_TRIES` or more earlier tries ended their process: this one should be isolated.
    """
    ended = len(storage.names_in(folder))
    mark = storage.join(folder, uuid.uuid4().hex)
    storage.write(mark, b"", durable=False)
    if ended:
        _log.warning("%s: %d tries before this one ended their process", folder, ended)
    try:
        yield ended >= MOST_TRIES
    finally:
        try:
            storage.remove_file(mark)
        except UserError as error:  # at worst one isolated try too many
            _log.warning("%s", error)
