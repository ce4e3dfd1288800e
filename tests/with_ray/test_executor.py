"""`RayExecutor` gives a model as many batches at the same time as it has threads."""

import threading

import pytest

from jobs.common.executor import PipelineSize
from jobs.common.ray_executor import RayExecutor

pytestmark = pytest.mark.usefixtures("cluster")


class Meeting:
    """Returns a batch when another one is in progress."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def __call__(self, batch):
        self._barrier.wait(60)
        return batch["shard"]


def _load(batch, tries):
    yield batch


def test_a_model_with_two_threads_has_two_batches_in_progress():
    items = [{"shard": f"{number}"} for number in range(6)]
    size = PipelineSize(loaders=1, models=(1, 1), cpus_per_model=1, gpus_per_model=0, threads=2)
    assert sorted(RayExecutor().pipeline(items, _load, Meeting, (), size)) == list("012345")
