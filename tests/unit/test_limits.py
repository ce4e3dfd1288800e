"""How much is taken in at once, and how long the queue may be, without a request."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from pydantic import ValidationError

from scalp_core.errors import ImageError
from serving.limits import Limits, Load
from serving.problems import Refusal
from serving.settings import Settings


def test_retry_after_follows_what_is_measured():
    load = Load(Limits(), seconds_per_photograph=0.1)
    load.in_flight = 40
    assert load.retry_after() == 4
    for _ in range(200):
        load.observe(1.0)
    assert 35 <= load.retry_after() <= 40
    load.in_flight = 1000
    assert load.retry_after() == 60


@pytest.mark.parametrize(
    ("seconds", "most"), [(0.01, 90), (0.1, 9), (2.0, 8)], ids=["by time", "by time, slow", "some always"]
)
def test_the_queue_is_as_long_as_it_takes_a_second_to_answer(seconds, most):
    load = Load(Limits(in_flight=128), seconds_per_photograph=seconds)
    for count in range(200):
        load.in_flight = count
        try:
            load.check()
        except Refusal as refused:
            assert (refused.status_code, refused.code) == (503, "overloaded")
            break
    assert load.in_flight == pytest.approx(most, abs=1)


def test_how_fast_the_queue_moves_is_measured_by_those_in_it():
    load = Load(Limits(), seconds_per_photograph=0.1)

    def pass_of(photographs: int, seconds: float) -> None:
        with ExitStack() as stack:
            for _ in range(photographs):
                stack.enter_context(load.grading())
            time.sleep(seconds)

    for _ in range(10):
        pass_of(20, 0.02)  # from 1 to 20 ms for each that was there
    load.in_flight = 100
    assert load.retry_after() <= 2

    with pytest.raises(ImageError), load.grading():
        time.sleep(0.2)
        raise ImageError("truncated", "it is cut")  # says nothing of the model
    assert load.retry_after() <= 2


def test_limits_that_let_no_photograph_in_are_refused():
    with pytest.raises(ValidationError, match="held_bytes"):
        Limits(held_bytes=1000)


def test_limits_that_ray_would_come_before_are_refused():
    with pytest.raises(ValidationError, match="or Ray refuses before"):
        Settings(limits=Limits(uploads=400, in_flight=200))
