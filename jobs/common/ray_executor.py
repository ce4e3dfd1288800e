"""Run the steps of a job in the workers of Ray."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy
from ray.exceptions import RayTaskError

from cluster.local import connect
from cluster.resources import Cluster
from jobs.common.executor import Executor, InferenceSize, Load, PipelineSize, R, T
from jobs.common.images import Columns, without_nulls
from jobs.common.isolate import MOST_TRIES, counted_try
from jobs.common.preflight import check_nodes
from scalp_core import storage
from scalp_core.errors import UserError

# Less than a model's CPU: Ray would fuse both into one step, in which the model waits for its own images.
_LOADER_CPUS = 0.9
_RETRY_TIMEOUT_S = 180
_LOAD_BATCH = 32
# Tasks of a `map` that Ray holds at a time.
_MOST_TASKS = 1000
_ROWS_A_BLOCK = 256


class RayExecutor(Executor):
    """Run steps as tasks and actors of Ray: loading in tasks, models in actors."""

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

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        call, shared, rest = _call.options(max_retries=-1), ray.put(task), iter(items)
        running = [call.remote(shared, item) for item in islice(rest, _MOST_TASKS)]
        try:
            while running:
                (done,), running = ray.wait(running)
                yield _result(done)
                running += [call.remote(shared, item) for item in islice(rest, 1)]
        finally:
            for reference in running:
                ray.cancel(reference)

    def pipeline(
        self,
        items: list[dict[str, Any]],
        load: Load,
        model: type,
        arguments: Sequence[Any],
        size: PipelineSize,
        deaths: str,
    ) -> Iterator[dict[str, Any]]:
        # Each item is a block, so that it is a separate task.
        dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
        # Each batch is a separate block, passed on as soon as it is loaded.
        dataset.context.target_max_block_size = 1
        dataset.context.execution_options.resource_limits = (
            dataset.context.execution_options.resource_limits.copy(object_store_memory=size.store_bytes)
        )
        loaded = dataset.map_batches(
            load,
            batch_size=1,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=size.loaders),
            num_cpus=_LOADER_CPUS,
        )
        results = loaded.map_batches(
            _counting_deaths(model),
            fn_constructor_args=(storage.join(deaths, uuid.uuid4().hex), *arguments),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=size.models[0], max_size=size.models[1]),
            num_gpus=size.gpus_per_model,
            num_cpus=size.cpus_per_model,
        )
        yield from results.iter_rows()

    def infer(
        self,
        rows: pa.Table,
        load: Callable[[Columns], Columns],
        model: type,
        arguments: Sequence[Any],
        size: InferenceSize,
    ) -> Iterator[Columns]:
        loaded = make_dataset(rows).map_batches(load, batch_size=_LOAD_BATCH)
        yield from loaded.map_batches(
            model,
            fn_constructor_args=tuple(arguments),
            batch_size=size.batch_size,
            compute=ActorPoolStrategy(size=size.models),
            num_gpus=size.gpus,
            num_cpus=size.cpus,
        ).iter_batches()


def make_dataset(table: pa.Table, rows_a_block: int = _ROWS_A_BLOCK) -> Dataset:
    """Ray dataset of manifest rows, in blocks that spread over the workers."""
    table = without_nulls(table)
    starts = range(0, table.num_rows, rows_a_block)
    return ray.data.from_arrow([table.slice(start, rows_a_block) for start in starts])


class _CountingDeaths:
    """Model of a pipeline that refuses a batch in which `MOST_TRIES` restarted processes died.

    Ray restarts a model without limit, so that lost nodes are survived, and runs its batches again: also
    those that only waited, which its own limit (`max_task_retries`) would count and not name. A process that
    was not restarted counts nothing: a note per batch in the folder `deaths` is two requests to storage.
    """

    model: type

    def __init__(self, deaths: str, *arguments: Any) -> None:
        self._deaths = deaths
        self._counts = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._model = self.model(*arguments)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if not self._counts:
            yield from self._model(batch)
            return
        (shard,) = batch["shard"].to_pylist()
        with (
            storage.retry_timeout(_RETRY_TIMEOUT_S),
            counted_try(storage.join(self._deaths, shard)) as is_hopeless,
        ):
            if is_hopeless:
                raise UserError(
                    f"processes of models died {MOST_TRIES} times or more while they graded shard {shard}; "
                    "if memory ran out, run the same command again with a smaller --batch-size, fewer "
                    "--models or on nodes with more memory"
                )
            results = list(self._model(batch))
        yield from results


def _counting_deaths(model: type) -> type:
    """Subclass of `_CountingDeaths` for a model, with the name of the model, which Ray shows."""
    return type(model.__name__, (_CountingDeaths,), {"model": model})


@ray.remote(num_cpus=1)
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _result(reference: ray.ObjectRef) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
