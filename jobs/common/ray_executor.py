"""Run the steps of a job in the workers of Ray: loading in tasks, models in actors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError
from ray.experimental import get_local_object_locations

from cluster.local import connect, set_up_data
from cluster.ray_internals import task_attempt
from cluster.resources import Cluster
from jobs.common.executor import Executor, Load, PipelineSize, R, T
from jobs.common.images import without_nulls
from jobs.common.isolate import MOST_TRIES
from jobs.common.preflight import check_nodes
from scalp_core.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset  # slow to import

# Loaded batches that wait, per model; bounds memory.
_AHEAD = 6
# Batches that a model holds: the next one is on its node before it is needed.
_HELD = 2
# Batches among which a model looks for one on its node.
_SEARCHED = 32
# Wait for a result after which all models may be waiting for something of a lost node.
_PATIENCE_S = 5
# Tasks of a `map` that Ray holds at a time.
_MOST_TASKS = 1000
_ROWS_A_BLOCK = 256

logger = logging.getLogger(__name__)


class RayExecutor(Executor):
    """Run steps as tasks and actors of Ray."""

    def cluster(self) -> Cluster:
        return connect()

    def check(self, reads: Sequence[str], out: str) -> None:
        check_nodes(reads, out)

    def nodes(self) -> int:
        return max(1, sum(node["Alive"] for node in ray.nodes()))

    def share(self, value: T) -> Callable[[], T]:
        return partial(ray.get, ray.put(value))

    def call(self, function: Callable[..., T], *arguments: Any, gpus: float = 0) -> T:
        return _result(_call.options(num_gpus=gpus).remote(function, *arguments))

    def submit(self, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        return partial(_result, _repeated.remote(function, *arguments))

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        shared, rest = ray.put(task), iter(items)
        running = [_repeated.remote(shared, item) for item in islice(rest, _MOST_TASKS)]
        try:
            while running:
                (done,), running = ray.wait(running)
                yield _result(done)
                running += [_repeated.remote(shared, item) for item in islice(rest, 1)]
        finally:
            for reference in running:
                ray.cancel(reference)

    def pipeline(
        self,
        items: Iterable[dict[str, Any]],
        load: Load,
        model: type,
        arguments: Sequence[Any],
        size: PipelineSize,
    ) -> Iterator[Any]:
        pool = _ModelPool(model, arguments, size)
        try:
            yield from pool.run(items, load)
        finally:
            pool.close()


def make_dataset(table: pa.Table, rows_a_block: int = _ROWS_A_BLOCK) -> Dataset:
    """Ray dataset of manifest rows, in blocks that spread over the workers."""
    set_up_data()
    table = without_nulls(table)
    starts = range(0, table.num_rows, rows_a_block)
    from ray.data import from_arrow

    return from_arrow([table.slice(start, rows_a_block) for start in starts])


@dataclass(eq=False)
class _Batch:
    """Loaded batch that waits for a model, and the number of models that died while they graded it."""

    reference: ray.ObjectRef
    name: str
    deaths: int = 0


@dataclass(eq=False)
class _Running:
    """Model that is ready, its node, and its batches by the reference of their results, in their order."""

    actor: ActorHandle
    node: str
    batches: dict[ray.ObjectRef, _Batch] = field(default_factory=dict)

    def take(self, loaded: deque[_Batch]) -> None:
        """Take one of the next batches that is on this node, else the next one."""
        batches = list(islice(loaded, _SEARCHED))
        places = get_local_object_locations([batch.reference for batch in batches])
        near = (
            batch for batch in batches if self.node in places.get(batch.reference, {}).get("node_ids", ())
        )
        batch = next(near, batches[0])
        loaded.remove(batch)
        self.batches[self.actor.run.remote(batch.reference)] = batch


class _ModelPool:
    """Models in actors that live through a whole run, fed by loading tasks.

    The driver holds references to a bounded number of batches. It replaces a model whose process or node is
    lost, and gives the batches of that model to others. A lost batch is loaded again by Ray.
    """

    def __init__(self, model: type, arguments: Sequence[Any], size: PipelineSize) -> None:
        # Ray shows the name of the class.
        actor = ray.remote(type(model.__name__, (_Model,), {}))
        self._actor = actor.options(
            num_cpus=size.cpus_per_model, num_gpus=size.gpus_per_model, max_concurrency=size.threads
        )
        self._arguments = ray.put((model, tuple(arguments)))
        self._size = size
        self._starting: dict[ray.ObjectRef, ActorHandle] = {}
        self._running: list[_Running] = []
        self._loading: dict[ray.ObjectRefGenerator, str] = {}
        self._loaded: deque[_Batch] = deque()
        self._deaths_while_starting = 0
        self._start(size.models[0])

    def run(self, items: Iterable[dict[str, Any]], load: Load) -> Iterator[Any]:
        """Pass each item through `load`, and its batches through a model; yield the results."""
        rest, load_shared = iter(items), ray.put(load)
        while self._load(rest, load_shared) or self._loaded or any(model.batches for model in self._running):
            self._grow()
            for reference in self._wait():
                if reference in self._loading:
                    self._receive(reference)
                elif reference in self._starting:
                    self._receive_model(reference)
                else:
                    yield from self._receive_result(reference)
            self._feed()

    def close(self) -> None:
        """End loading tasks and models."""
        for task in self._loading:
            ray.cancel(task)
        for actor in (*self._starting.values(), *(model.actor for model in self._running)):
            ray.kill(actor)

    @property
    def _is_full(self) -> bool:
        return len(self._loaded) >= _AHEAD * max(1, len(self._running))

    def _load(self, rest: Iterator[dict[str, Any]], load: ray.ObjectRef) -> bool:
        """Keep the loading tasks at their number while there is room; return whether there are any."""
        for item in islice(rest, 0 if self._is_full else self._size.loaders - len(self._loading)):
            self._loading[_load.remote(load, item)] = item["shard"]
        return bool(self._loading)

    def _grow(self) -> None:
        """Replace lost models; double the models while batches wait, up to the maximum."""
        low, high = self._size.models
        number = len(self._running) + len(self._starting)
        self._start(low - number)
        if self._is_full and not self._starting:
            self._start(min(number, high - number))

    def _start(self, number: int) -> None:
        for _ in range(number):
            actor = self._actor.remote(self._arguments)
            self._starting[actor.node.remote()] = actor

    def _wait(self) -> list[Any]:
        """Wait for results, models that started, and, if there is room, loaded batches."""
        results = [*self._starting, *(reference for model in self._running for reference in model.batches)]
        references = results if self._is_full else [*results, *self._loading]
        while not ray.wait(references, timeout=_PATIENCE_S, fetch_local=False)[0]:
            # A new model, or what loads a lost batch again, needs the CPU of a task whose batch is not taken.
            if not self._running or self._has_lost_batches():
                references = [*results, *self._loading]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        return ready

    def _has_lost_batches(self) -> bool:
        """Whether a loaded batch went with its node, and is being loaded again."""
        batches = [*self._loaded, *(batch for model in self._running for batch in model.batches.values())]
        references = [batch.reference for batch in batches]
        if not references:
            return False
        _, lost = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        return bool(lost)

    def _receive(self, task: ray.ObjectRefGenerator) -> None:
        try:
            self._loaded.append(_Batch(next(task), self._loading[task]))
        except StopIteration:
            del self._loading[task]

    def _receive_model(self, reference: ray.ObjectRef) -> None:
        actor = self._starting.pop(reference)
        try:
            self._running.append(_Running(actor, ray.get(reference)))
            self._deaths_while_starting = 0
        except (RayActorError, OutOfMemoryError) as error:
            self._deaths_while_starting += 1
            logger.warning("a model was lost while it loaded: %s", error)
            if self._deaths_while_starting == MOST_TRIES:
                raise UserError(
                    f"models died {MOST_TRIES} times in a row while they loaded "
                    f"({str(error).strip().splitlines()[-1]}); if memory ran out, run the same command again "
                    "with fewer --replicas or on nodes with more memory"
                ) from error

    def _receive_result(self, reference: ray.ObjectRef) -> Iterator[Any]:
        model = next((model for model in self._running if reference in model.batches), None)
        if model is None:  # it was lost with an earlier batch
            return
        try:
            result = _result(reference)
        except (RayActorError, OutOfMemoryError) as error:
            self._replace(model, error)
            return
        del model.batches[reference]
        yield result

    def _replace(self, model: _Running, error: Exception) -> None:
        """Drop a lost model; its batches are graded by others.

        Raises:
            UserError: Models died repeatedly in one batch.
        """
        lost = list(model.batches.values())
        # A lost node says nothing about the batch. Ray may report one as unavailable, before it is sure.
        is_alive = any(node["NodeID"] == model.node and node["Alive"] for node in ray.nodes())
        logger.warning("a model was lost while it graded shard %s: %s", lost[0].name, error)
        if is_alive and not isinstance(error, ActorUnavailableError):
            for batch in lost[: self._size.threads]:
                batch.deaths += 1
        deaths = max(batch.deaths for batch in lost)
        if deaths > MOST_TRIES:
            suspects = " or ".join(batch.name for batch in lost if batch.deaths == deaths)
            raise UserError(
                f"processes of models died {deaths} times while they graded shard {suspects}; "
                "if memory ran out, run the same command again with a smaller --batch-size, fewer "
                "--replicas or on nodes with more memory"
            )
        self._running.remove(model)
        self._loaded.extendleft(reversed(lost))
        ray.kill(model.actor)  # it may be alive, and unreachable for a moment

    def _feed(self) -> None:
        """Give loaded batches to models, first to those without one."""
        for held in range(_HELD):
            for model in self._running:
                if self._loaded and len(model.batches) == held:
                    model.take(self._loaded)


class _Model:
    """Actor that holds a model."""

    def __init__(self, made: tuple[type, tuple[Any, ...]]) -> None:
        model, arguments = made
        self._model = model(*arguments)

    def node(self) -> str:
        """Id of the node of this actor."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, batch: Any) -> Any:
        """Result of a batch."""
        return self._model(batch)


# A task yields its next batch when the driver has taken the one before.
@ray.remote(num_cpus=1, max_retries=-1, _generator_backpressure_num_objects=1)
def _load(load: Load, item: dict[str, Any]) -> Iterator[Any]:
    yield from load(item, task_attempt())


@ray.remote(num_cpus=1)
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


_repeated = _call.options(max_retries=-1)


def _result(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
