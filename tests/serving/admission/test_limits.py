"""Limits of a replica: open requests and length of the queue."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from scalp_core.errors import ImageError
from serving.admission import limits
from serving.admission.limits import Limits, Load
from serving.http.problems import Refusal
from serving.settings import Settings


def test_retry_after_follows_what_is_measured():
    load = Load(Limits(), seconds_per_image=0.1)
    load.in_flight.take("", 40)
    assert load.retry_after() == 4
    for _ in range(200):
        load.observe(1.0)
    assert 35 <= load.retry_after() <= 40
    load.in_flight.take("", 1000)
    assert load.retry_after() == 60


@pytest.mark.parametrize(
    ("seconds", "most"), [(0.01, 90), (0.1, 9), (2.0, 8)], ids=["by time", "by time, slow", "some always"]
)
def test_the_queue_is_as_long_as_it_takes_a_second_to_answer(seconds, most):
    load = Load(Limits(in_flight=128, queue_seconds=1), seconds_per_image=seconds)
    for _ in range(200):
        try:
            load.check()
        except Refusal as refused:
            assert (refused.status_code, refused.code) == (503, "overloaded")
            break
        load.in_flight.take("")
    assert load.in_flight.total == pytest.approx(most, abs=1)


def test_how_fast_the_queue_moves_is_measured_by_those_in_it(monkeypatch):
    now = 0.0
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now))
    load = Load(Limits(), seconds_per_image=0.1)

    def pass_of(photographs: int, seconds: float) -> None:
        nonlocal now
        with ExitStack() as stack:
            for _ in range(photographs):
                stack.enter_context(load.grading())
            now += seconds

    for _ in range(10):
        pass_of(20, 0.02)  # from 1 to 20 ms for each that was there
    load.in_flight.take("", 100)
    assert load.retry_after() <= 2

    with pytest.raises(ImageError), load.grading():
        now += 0.2
        raise ImageError("truncated", "it is cut")  # says nothing of the model
    assert load.retry_after() <= 2


def test_limits_that_let_no_photograph_in_are_refused():
    with pytest.raises(ValidationError, match="held_bytes"):
        Limits(held_bytes=1000)


def test_limits_that_ray_would_come_before_are_refused():
    with pytest.raises(ValidationError, match="or Ray refuses requests first"):
        Settings(limits=Limits(uploads=400, in_flight=200))


def filled(load: Load, owner: str) -> int:
    """Fill the replica with requests of `owner`; return their number at the first refusal."""
    for count in range(200):
        try:
            load.check(owner)
        except Refusal:
            return count
        load.in_flight.take(owner)
    return 200


def test_an_owner_that_fills_the_queue_leaves_the_others_their_part():
    load = Load(Limits(in_flight=128, queue_seconds=1), seconds_per_image=0.03)
    alone = filled(load, "greedy")
    assert alone == pytest.approx(30, abs=1)  # nobody else asks: all of it
    assert filled(load, "modest") == pytest.approx(alone / 2, abs=2)
    for _ in range(alone):
        load.in_flight.release("greedy")
    assert filled(load, "greedy") == pytest.approx(alone / 2, abs=2)


def test_no_owner_holds_more_than_half_of_the_places():
    load = Load(Limits(in_flight=10, uploads=6), seconds_per_image=0.0001)
    assert filled(load, "greedy") == 5
    for _ in range(3):
        load.uploads.take("slow")
    with pytest.raises(Refusal):
        load.check("slow")
    load.check("modest")
    assert not load.held_bytes.can_take("greedy", Limits().held_bytes // 2 + 1)
