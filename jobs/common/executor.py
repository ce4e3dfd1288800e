"""The steps of a job, and what runs them: `local_executor`, one process, or `ray_executor`, a cluster.

A step is a picklable callable from one item to its result. It must be idempotent: it runs again when its
process dies, also after its last write.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.resources import Cluster, is_joined

if TYPE_CHECKING:
    from scalp_core.inference.predictor import Device

T = TypeVar("T")
R = TypeVar("R")
Load = Callable[[dict[str, Any], int], Iterator[Any]]


def needs_ray(device: Device = "auto") -> bool:
    """Whether a job runs in Ray by default: Ray runs or is joined, or the device is a GPU.

    A GPU needs several processes for its models and their images, which Ray runs.

    Raises:
        UserError: The device is unavailable.
    """
    from scalp_core.inference.predictor import resolve_device  # half a second

    ray = sys.modules.get("ray")  # its import takes a third of a second
    return bool(ray and ray.is_initialized()) or is_joined() or resolve_device(device) == "cuda"


@dataclass(frozen=True)
class PipelineSize:
    """Loading tasks, fewest and most models of a pipeline, and CPUs and fraction of a GPU of each model.

    `threads` of a model take batches at the same time; more than one needs a thread-safe class.
    """

    loaders: int
    models: tuple[int, int]
    cpus_per_model: int
    gpus_per_model: float
    threads: int = field(default=1, kw_only=True)


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
        """Refuse sources or an output that the workers cannot reach, by a `UserError`."""

    @abstractmethod
    def nodes(self) -> int:
        """Number of nodes that are alive."""

    @abstractmethod
    def share(self, value: T) -> Callable[[], T]:
        """Store a large value once for all workers; return a picklable callable that returns it."""

    @abstractmethod
    def call(self, function: Callable[..., T], *arguments: Any, gpus: float = 0) -> T:
        """Run `function` once in a worker with `gpus` GPUs, so that its memory is not the driver's."""

    @abstractmethod
    def submit(self, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """Start `function`, which is idempotent, next to other steps; in one process, it runs when needed.

        Returns:
            Callable that waits for the result, and returns it or raises the error.
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
    ) -> Iterator[Any]:
        """Pass each item through `load`, and its batches through a model; yield the results in any order.

        Args:
            items: Items to load, each named in its key `shard`; taken as they are needed.
            load: Makes batches from an item and the number of times that loading ended its process; each is
                passed on as soon as it is made.
            model: Class, made with `arguments` in each model's process; its instances turn a batch into a
                result.
            arguments: Arguments of the constructor of `model`.
            size: Numbers of loading tasks and models.

        Raises:
            UserError: A step raised it, or processes of models died repeatedly in one batch.
        """
