"""`InProcessExecutor` runs the steps of a job in this process, in order."""

import pyarrow as pa

from cluster.ray_internals import task_attempt
from jobs.common.executor import InProcessExecutor, PipelineSize


class Doubled:
    def __init__(self, times: int) -> None:
        self._times = times

    def __call__(self, batch):
        yield pa.table({"value": [self._times * value for value in batch["value"].to_pylist()]})


def _twice(batch):
    yield batch
    yield batch


def test_steps_run_in_order_and_in_this_process():
    executor = InProcessExecutor()
    items = [{"value": number} for number in range(3)]
    assert [row["value"] for row in executor.map(lambda row: {"value": -row["value"]}, items)] == [0, -1, -2]
    rows = executor.pipeline(items, _twice, Doubled, (10,), PipelineSize(1, (1, 1), 1, 0, 1), "")
    assert [row["value"] for row in rows] == [0, 0, 10, 10, 20, 20]
    assert executor.call(max, 1, 2) == 2
    assert executor.share(items)() is items
    assert task_attempt() == 0
