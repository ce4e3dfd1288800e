"""The steps of a job, and what runs them: `local_executor`, one process, or `ray_executor`, a cluster.

A step is a picklable callable from one item to its result. It must be idempotent: it runs again when its
process dies, also after its last write.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from cluster.resources import Cluster
from jobs.common.images import Columns

T = TypeVar("T")
R = TypeVar("R")
Load = Callable[[pa.Table], Iterator[pa.Table]]


@dataclass(frozen=True)
class PipelineSize:
    """Number of workers of a pipeline, and what each reserves.

    Args:
        loaders: Concurrent loading tasks.
        models: Fewest and most models, which live through the whole pipeline.
        cpus_per_model: CPUs reserved for each model actor.
        gpus_per_model: Fraction of a GPU reserved for each model actor.
    """

    loaders: int
    models: tuple[int, int]
    cpus_per_model: int
    gpus_per_model: float


@dataclass(frozen=True)
class InferenceSize:
    """Number of model actors of `infer`, rows per forward pass, and what each actor reserves."""

    models: int
    batch_size: int
    cpus: int
    gpus: int


class Executor(ABC):
    """Run the steps of a job."""

    uses_ray = True

    @abstractmethod
    def cluster(self) -> Cluster:
        """Start or join what runs the steps, and return its size.

        Raises:
            ClusterError: The cluster does not answer.
        """

    @abstractmethod
    def check(self, reads: Sequence[str], out: str) -> None:
        """Refuse sources or an output that the workers cannot reach.

        Raises:
            UserError: A worker cannot reach it.
        """

    @abstractmethod
    def nodes(self) -> int:
        """Number of nodes that are alive."""

    @abstractmethod
    def share(self, value: T) -> Callable[[], T]:
        """Store a large value once for all workers; return a picklable callable that returns it."""

    @abstractmethod
    def call(self, function: Callable[..., T], *arguments: Any, gpus: float = 0) -> T:
        """Run `function` once in a worker, so that its memory is not the driver's.

        Args:
            function: Function to call with `arguments`.
            gpus: Fraction of a GPU that the worker needs.

        Raises:
            UserError: The function raised it.
        """

    @abstractmethod
    def map(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Run `task` for each item, perhaps in parallel; yield the results in any order."""

    @abstractmethod
    def pipeline(
        self,
        items: Iterable[dict[str, Any]],
        load: Load,
        model: type,
        arguments: Sequence[Any],
        size: PipelineSize,
        deaths: str,
    ) -> Iterator[dict[str, Any]]:
        """Pass each item through `load`, and its batches through a model.

        Args:
            items: Items to load, each named in its key `shard`; taken as they are needed.
            load: Makes batches of one row from an item, each named in its column `shard`; a batch is passed
                on as soon as it is made.
            model: Class whose instances turn such a batch into result rows.
            arguments: Arguments of the constructor of `model`.
            size: Numbers of loading tasks and models.
            deaths: Folder for notes on items and batches in which a process died.

        Raises:
            UserError: Processes of models died repeatedly in one batch.
        """

    @abstractmethod
    def infer(
        self,
        rows: pa.Table,
        load: Callable[[Columns], Columns],
        model: type,
        arguments: Sequence[Any],
        size: InferenceSize,
    ) -> Iterator[Columns]:
        """Pass rows through `load`, and through a model; yield batches in any order.

        Args:
            rows: Rows of a manifest, with the columns that locate images.
            load: Adds columns to a batch.
            model: Class whose instances add columns to a batch.
            arguments: Arguments of the constructor of `model`.
            size: Number of models, and what each reserves.
        """
