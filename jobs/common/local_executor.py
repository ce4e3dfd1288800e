"""Run the steps of a job in this process, without Ray: loading in threads next to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, Full, Queue
from typing import Any

from cluster.resources import Cluster
from jobs.common import interrupt
from jobs.common.executor import Executor, Load, PipelineSize, R, T
from jobs.common.isolate import MOST_TRIES

# Loaded batches that wait for the model, per loading thread; bounds memory.
_AHEAD = 2
_POLL_S = 0.1


class LocalExecutor(Executor):
    """Run the steps in this process. Decoding and inference release the interpreter's lock.

    Args:
        cpus: Cores of the model, and threads that load images.
        gpus: 1 to run models on the GPU of this machine.
        restarts: Number of earlier processes of this command that crashed; see `jobs.common.supervise`.
        progress: Called after each result.
    """

    uses_ray = False

    def __init__(
        self, cpus: int = 1, gpus: int = 0, restarts: int = 0, progress: Callable[[], None] = lambda: None
    ) -> None:
        self._cluster = Cluster(cpus=2 * cpus, gpus=gpus, nodes=1, cores_per_node=cpus)
        self._restarts = restarts
        self._progress = progress

    def cluster(self) -> Cluster:
        return self._cluster

    def check(self, reads: Sequence[str], out: str) -> None:
        """Check nothing: the driver has reached it already."""

    def nodes(self) -> int:
        return 1

    def share(self, value: T) -> Callable[[], T]:
        return lambda: value

    def call(self, function: Callable[..., T], *arguments: Any, gpus: float = 0) -> T:  # noqa: ARG002
        return function(*arguments)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        return partial(function, *arguments)

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        for item in items:
            yield task(item)
            self._progress()

    def pipeline(
        self,
        items: Iterable[dict[str, Any]],
        load: Load,
        model: type,
        arguments: Sequence[Any],
        size: PipelineSize,
    ) -> Iterator[Any]:
        rest, lock, stop = enumerate(items), threading.Lock(), threading.Event()
        loaded: Queue[Any] = Queue(_AHEAD * size.loaders)
        # What crashed an earlier process of this command is among the items that it had not finished.
        suspects = (2 + _AHEAD) * size.loaders if self._restarts else 0

        def put(batch: Any) -> None:
            while not stop.is_set():
                with suppress(Full):
                    loaded.put(batch, timeout=_POLL_S)
                    return

        def load_items() -> None:
            try:
                while not stop.is_set():
                    with lock:
                        number, item = next(rest, (0, None))
                    if item is None:
                        break
                    for batch in load(item, MOST_TRIES if number < suspects else 0):
                        put(batch)
                put(None)
            except BaseException as error:  # raised again by the thread of the model
                put(error)

        threads = ThreadPoolExecutor(size.loaders, "load")
        try:
            for _ in range(size.loaders):
                threads.submit(load_items)
            grade = model(*arguments)
            loading = size.loaders
            while loading:
                interrupt.check()
                batch = loaded.get()
                if batch is None:
                    loading -= 1
                    continue
                if isinstance(batch, BaseException):
                    raise batch
                yield grade(batch)
                self._progress()
        finally:
            stop.set()
            with suppress(Empty):  # frees memory while the threads end
                while True:
                    loaded.get_nowait()
            threads.shutdown(wait=False)  # a thread may wait minutes for storage
