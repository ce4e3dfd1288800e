"""Isolate native crashes: run a call in a child process, and count tries that ended their process.

A decoder that crashes its process costs one image, not its shard: after `MOST_TRIES` such tries, the images
of a shard are decoded in a child process.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

from scalp_core import storage
from scalp_core.errors import IMAGE_CODES, ImageError, UserError

MOST_TRIES = 3

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Isolation:
    """Spawned child process for calls that may crash; started by the first call, and again after a crash.

    Functions, arguments and results are pickled. Threads may share it; calls run one at a time. The child
    ends with this process, which holds the other end of its pipe.
    """

    def __init__(self) -> None:
        self._pipe: Connection | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe:
            self._pipe.close()
            self._pipe = None

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return `function(*arguments)`, computed in the child process.

        Raises:
            ImageError: The child process crashed; code `crashed`.
            Exception: The function raised it.
        """
        with self._lock:
            pipe = self._pipe = self._pipe or _start_child()
            try:
                pipe.send((function, arguments))
                result, error = pipe.recv()
            except (EOFError, OSError):
                self.__exit__()
                raise ImageError("crashed", IMAGE_CODES["crashed"]) from None
        if error:
            raise error
        return cast(T, result)


def _start_child() -> Connection:
    context = get_context("spawn")
    parent_end, child_end = context.Pipe()
    context.Process(target=_serve, args=(child_end,), daemon=True).start()
    child_end.close()
    return parent_end


def _serve(pipe: Connection) -> None:
    """Answer calls until the other end of the pipe is closed."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:
            pipe.send((None, error))


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
