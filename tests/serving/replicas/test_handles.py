"""Clients of a deployment: retries after the death of a replica, a full queue, a model that changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from scalp_core.images.preprocess import Preprocess
from serving.admission.decoding import Decoders
from serving.admission.limits import Limits, Load
from serving.http.problems import Refusal
from serving.observability.metrics import ImageMetrics
from serving.replicas.handles import DeploymentClient, GraderClient, LocalHandle
from serving.schemas.grading import Graded
from serving.settings import Scaling
from tests.support.images import jpeg

SMALL, LARGE = Preprocess(size=32), Preprocess(size=64)
GRADED = Graded(None, None, "bundle", 1, 0.0, 0.0)
DEATHS = [ActorDiedError, lambda: ActorUnavailableError("its node is unreachable", None)]


class Handle:
    """Stub of a deployment's handle that returns or raises outcomes in order."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def options(self, **_: object) -> Handle:
        return self

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def call(*arguments: Any) -> Any:
            self.calls.append((method, arguments))
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return SimpleNamespace(remote=call)


def client(handle: Handle) -> DeploymentClient:
    return DeploymentClient(handle, Load(Limits()))


def grader_client(handle: Handle) -> GraderClient:
    return GraderClient(handle, Load(Limits()), ImageMetrics(), Decoders())


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_request_of_a_dead_replica_is_sent_again_as_it_was(death: Callable[[], Exception], deaths):
    handle = Handle(*(death() for _ in range(deaths)), "answer")
    assert asyncio.run(client(handle).call("grade", "pixels", 7)) == "answer"
    assert handle.calls == [("grade", ("pixels", 7))] * (deaths + 1)


@pytest.mark.parametrize("death", DEATHS)
def test_request_is_sent_again_twice_at_most(death):
    handle = Handle(*(death() for _ in range(9)))
    with pytest.raises(type(death())):
        asyncio.run(client(handle).call("grade", "pixels"))
    assert len(handle.calls) == 3


@pytest.mark.parametrize("error", [RuntimeError("the model failed"), ValueError("x"), TimeoutError()])
def test_other_errors_are_not_retried(error):
    handle = Handle(error, "answer")
    with pytest.raises(type(error)):
        asyncio.run(client(handle).call("grade", "pixels"))
    assert len(handle.calls) == 1


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_full_queue_is_refused_with_retry_after_and_not_retried(deaths):
    full = BackPressureError(num_queued_requests=8, max_queued_requests=8)
    handle = Handle(*(ActorDiedError() for _ in range(deaths)), full, "answer")
    with pytest.raises(Refusal) as refused:
        asyncio.run(client(handle).call("grade", "pixels"))
    assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert handle.outcomes == ["answer"]


def test_image_is_decoded_again_for_a_model_with_other_preprocessing():
    handle = Handle(SMALL, LARGE, GRADED, GRADED)
    grader = grader_client(handle)

    async def grade_two() -> list[int]:
        return [len((await grader.grade(jpeg(seed)))[0].decoded.pixels) for seed in (0, 1)]

    assert asyncio.run(grade_two()) == [64, 64]
    methods = [method for method, _ in handle.calls]
    assert methods == ["preprocess", "grade", "grade", "grade"]  # the second image starts with the new one
    sent = [(arguments[0].shape[:2], arguments[2]) for _, arguments in handle.calls[1:]]
    assert sent == [((32, 32), SMALL), ((64, 64), LARGE), ((64, 64), LARGE)]


def test_model_that_changes_at_each_attempt_is_refused_after_three():
    sizes = [Preprocess(size=size) for size in (32, 48, 64, 80, 96)]
    handle = Handle(*sizes)
    with pytest.raises(Refusal) as refused:
        asyncio.run(grader_client(handle).grade(jpeg(0)))
    assert (refused.value.status_code, refused.value.code) == (503, "model_changes")
    grades = [arguments for method, arguments in handle.calls if method == "grade"]
    assert [arguments[2] for arguments in grades] == sizes[:3]
    assert all(np.shape(arguments[0])[0] == size.size for arguments, size in zip(grades, sizes, strict=False))


class Blocked:
    """Stub of an object whose calls end when `free` is set."""

    def __init__(self) -> None:
        self.free = asyncio.Event()

    async def grade(self, number: int) -> int:
        await self.free.wait()
        return number


def test_calls_in_this_process_wait_as_those_of_a_deployment_and_more_are_refused():
    scaling = Scaling(target_ongoing_requests=1, max_ongoing_requests=2, max_queued_requests=1)

    async def call() -> list[Any]:
        blocked = Blocked()
        local = DeploymentClient(LocalHandle(blocked, scaling), Load(Limits()))
        calls = [asyncio.create_task(local.call("grade", number)) for number in range(5)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        calls[2].cancel()  # its client left; another one takes its place
        await asyncio.wait(calls[2:3])
        calls.append(asyncio.create_task(local.call("grade", 5)))
        await asyncio.sleep(0)
        blocked.free.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, left, *refused, last = asyncio.run(call())
    assert (first, second, last) == (0, 1, 5)
    assert isinstance(left, asyncio.CancelledError)
    assert [error.code for error in refused] == ["overloaded"] * 2
