"""`LocalExecutor` runs the steps of a job in this process."""

import signal
import threading
from contextlib import suppress

import pytest

from jobs.common import interrupt
from jobs.common.executor import PipelineSize
from jobs.common.local_executor import LocalExecutor
from scalp_core.errors import UserError
from tests.support import crashes


class Doubled:
    def __init__(self, times: int) -> None:
        self._times = times

    def __call__(self, batch):
        return {"value": self._times * batch["value"]}


def _twice(batch, tries):
    yield batch
    yield batch


def await_loading_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("load"):
            thread.join(10)
            assert not thread.is_alive()


def test_steps_run_in_order_and_in_this_process():
    executor = LocalExecutor()
    items = [{"value": number} for number in range(3)]
    assert [row["value"] for row in executor.map(lambda row: {"value": -row["value"]}, items)] == [0, -1, -2]
    rows = executor.pipeline(items, _twice, Doubled, (10,), PipelineSize(1, (1, 1), 1, 0))
    assert [row["value"] for row in rows] == [0, 0, 10, 10, 20, 20]
    assert executor.call(max, 1, 2) == executor.submit(max, 1, 2)() == 2
    assert executor.share(items)() is items


def test_loading_threads_load_each_item_once():
    executor = LocalExecutor()
    items = [{"value": number} for number in range(50)]
    rows = executor.pipeline(items, _twice, Doubled, (10,), PipelineSize(4, (1, 1), 1, 0))
    assert sorted(row["value"] for row in rows) == sorted(
        10 * number for number in range(50) for _ in range(2)
    )


def test_an_error_of_loading_ends_the_pipeline():
    def load(batch, tries):
        if batch["value"] == 3:
            raise UserError("the bucket is gone")
        yield batch

    rows = LocalExecutor().pipeline(
        [{"value": number} for number in range(50)], load, Doubled, (1,), PipelineSize(2, (1, 1), 1, 0)
    )
    with pytest.raises(UserError, match="the bucket is gone"):
        list(rows)
    await_loading_threads()


def test_a_pipeline_that_is_left_ends_its_threads():
    items = [{"value": number} for number in range(1000)]
    rows = LocalExecutor().pipeline(items, _twice, Doubled, (1,), PipelineSize(2, (1, 1), 1, 0))
    next(rows)
    rows.close()
    await_loading_threads()


class Swallowing(Doubled):
    """Loads as a library does that ignores errors of its callbacks."""

    def __init__(self, times: int) -> None:
        super().__init__(times)
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def _interrupt_while_the_model_loads():
    interrupt.remember()
    rows = LocalExecutor().pipeline(
        [{"shard": "a", "value": 1}], _twice, Swallowing, (1,), PipelineSize(1, (1, 1), 1, 0)
    )
    with pytest.raises(KeyboardInterrupt):
        next(rows)
    await_loading_threads()


def test_an_interrupt_that_the_model_swallows_ends_the_pipeline():
    """In a process of its own: Ctrl-C in a test process can end it."""
    crashes.run(_interrupt_while_the_model_loads)
