"""Executors run the steps of a job: in Ray's workers, or one after the other in this process.

A step is a picklable callable from one item to its result. It must be idempotent: Ray runs it again when its
worker dies, also after its last write.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import ray
from joblib import cpu_count
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.exceptions import RayTaskError

from cluster.local import Cluster, connect
from jobs.common.images import Columns, make_dataset, without_nulls
from jobs.common.isolate import MOST_TRIES, counted_try
from jobs.common.preflight import check_nodes
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.inference.predictor import resolve_device

T = TypeVar("T")
R = TypeVar("R")
Load = Callable[[pa.Table], Iterator[pa.Table]]

# Less than a model's CPU: Ray would fuse both into one step, in which the model waits for its own images.
_LOADER_CPUS = 0.9
_RETRY_TIMEOUT_S = 180
_LOAD_BATCH = 32
# Tasks of a `map` that Ray holds at a time.
_MOST_TASKS = 1000


@dataclass(frozen=True)
class PipelineSize:
    """Number of workers of a pipeline, and what each reserves.

    Args:
        loaders: Concurrent loading tasks.
        models: Fewest and most model actors.
        cpus_per_model: CPUs reserved for each model actor.
        gpus_per_model: Fraction of a GPU reserved for each model actor.
        store_bytes: Bytes of loaded batches that may wait for a model.
    """

    loaders: int
    models: tuple[int, int]
    cpus_per_model: int
    gpus_per_model: float
    store_bytes: int


@dataclass(frozen=True)
class InferenceSize:
    """Number of model actors of `infer`, rows per forward pass, and what each actor reserves."""

    models: int
    batch_size: int
    cpus: int
    gpus: int


class RayExecutor:
    """Run steps as tasks and actors of Ray."""

    def cluster(self) -> Cluster:
        """Start or join the cluster that runs the steps, and return its size.

        Raises:
            ClusterError: The cluster does not answer.
        """
        return connect()

    def check(self, reads: Sequence[str], out: str) -> None:
        """Refuse sources or an output that the workers cannot reach.

        Raises:
            UserError: A worker cannot reach it.
        """
        check_nodes(reads, out)

    def nodes(self) -> int:
        """Number of nodes that are alive."""
        return max(1, sum(node["Alive"] for node in ray.nodes()))

    def share(self, value: T) -> Callable[[], T]:
        """Store a large value once for all workers; return a picklable callable that returns it."""
        return partial(ray.get, ray.put(value))

    def call(self, function: Callable[..., T], *arguments: Any, gpus: float = 0) -> T:
        """Run `function` once in a worker, so that its memory is not the driver's.

        Args:
            function: Function to call with `arguments`.
            gpus: Fraction of a GPU that the worker needs.

        Raises:
            UserError: The function raised it.
        """
        return _result(_call.options(num_gpus=gpus).remote(function, *arguments))

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Run `task` for each item, in parallel; yield the results in any order."""
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
        """Pass each item through `load`, in tasks, and its batches through a model, in actors.

        Args:
            items: Items to load.
            load: Makes batches of one row from an item, each named in its column `shard`; a batch is passed
                on as soon as it is made.
            model: Class whose instances turn such a batch into result rows.
            arguments: Arguments of the constructor of `model`.
            size: Numbers of loading tasks and models.
            deaths: Folder for notes on batches in which the process of a model died.

        Raises:
            UserError: Processes of models died repeatedly in one batch.
        """
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
        """Pass rows through `load`, in tasks, and through a model, in actors; yield batches in any order.

        Args:
            rows: Rows of a manifest, with the columns that locate images.
            load: Adds columns to a batch.
            model: Class whose instances add columns to a batch.
            arguments: Arguments of the constructor of `model`.
            size: Number of models, and what each reserves.
        """
        loaded = make_dataset(rows).map_batches(load, batch_size=_LOAD_BATCH)
        yield from loaded.map_batches(
            model,
            fn_constructor_args=tuple(arguments),
            batch_size=size.batch_size,
            compute=ActorPoolStrategy(size=size.models),
            num_gpus=size.gpus,
            num_cpus=size.cpus,
        ).iter_batches()


class InProcessExecutor:
    """Run the same steps, by the same methods, in this process, one after the other, without Ray.

    Args:
        cpus: Threads of a model.
        gpus: 1 to run models on the GPU of this machine.
    """

    def __init__(self, cpus: int = 1, gpus: int = 0) -> None:
        self._cluster = Cluster(cpus=2 * cpus, gpus=gpus, nodes=1, cores_per_node=cpus)

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

    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(task, items)

    def pipeline(
        self,
        items: list[dict[str, Any]],
        load: Load,
        model: type,
        arguments: Sequence[Any],
        size: PipelineSize,  # noqa: ARG002
        deaths: str,  # noqa: ARG002
    ) -> Iterator[dict[str, Any]]:
        grade = model(*arguments)
        for item in items:
            for batch in load(pa.Table.from_pylist([item])):
                for result in grade(batch):
                    yield from result.to_pylist()

    def infer(
        self,
        rows: pa.Table,
        load: Callable[[Columns], Columns],
        model: type,
        arguments: Sequence[Any],
        size: InferenceSize,
    ) -> Iterator[Columns]:
        infer = model(*arguments)
        for batch in without_nulls(rows).to_batches(max_chunksize=size.batch_size):
            columns = {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}
            yield infer(load(columns))


Executor = RayExecutor | InProcessExecutor


def make_executor(local: bool) -> Executor:
    """Executor of a command: Ray, or with `--local` this process with all its cores and its GPU."""
    if not local:
        return RayExecutor()
    return InProcessExecutor(cpu_count(), gpus=int(resolve_device("auto") == "cuda"))


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
