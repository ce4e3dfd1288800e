"""Canaries that hang or fail and slow shadows do not harm clients; with the real parts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from scalp_core.errors import ImageError, UserError
from scalp_core.images.preprocess import Preprocess
from serving import app
from serving.admission.decoding import Decoders
from serving.admission.limits import Limits, Load
from serving.http.problems import Refusal
from serving.replicas import breaker
from serving.replicas.breaker import CircuitBreaker
from serving.replicas.handles import GraderClient
from serving.replicas.rollout import Rollout
from serving.schemas.grading import Graded
from serving.settings import CandidateSettings, Settings
from tests.support.images import jpeg
from tests.support.virtual_time import run

GRADED = Graded(None, None, "bundle", 1, 0.0, 0.0)


class Handle:
    """Stub of a deployment of graders that is slow or fails."""

    def __init__(self, seconds: float = 0.0, preprocess: Preprocess | None = None) -> None:
        self.seconds, self.error = seconds, None
        self.way = preprocess or Preprocess(size=64)
        self.asked = 0
        self.grade, self.preprocess, self.describe = map(self._method, ("grade", "preprocess", "describe"))

    def options(self, **_: object) -> Handle:
        return self

    def _method(self, name: str) -> SimpleNamespace:
        async def call(*arguments: object) -> object:
            if name == "preprocess":
                return self.way
            self.asked += 1
            if self.error:
                raise self.error
            await asyncio.sleep(self.seconds)
            return GRADED

        return SimpleNamespace(remote=call)


class Metrics:
    """Stub of metrics that counts decoded images."""

    decoded = 0

    def stage(self, _name: str) -> Metrics:
        self.decoded += 1
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def made(mode: str, candidate: Handle, seconds: float = 30) -> tuple[Rollout, Handle, Load, Metrics]:
    load, first, metrics, decoders = Load(Limits(), 0.02), Handle(), Metrics(), Decoders()
    graders = [
        GraderClient(first, load, metrics, decoders),
        GraderClient(candidate, Load(Limits()), metrics, decoders),
    ]
    settings = CandidateSettings(mode=mode, share=1)
    return Rollout(settings, *graders, None, seconds), first, load, metrics


def test_where_a_canary_hangs_the_first_answers_in_time_and_soon_it_is_not_asked():
    async def scenario() -> None:
        candidate = Handle(3600)
        rollout, first, _, _ = made("canary", candidate, seconds=3)
        for _ in range(8):
            async with asyncio.timeout(3):
                assert (await rollout.grade(jpeg(0)))[1] is GRADED
        assert first.asked == 8
        assert candidate.asked == 5
        state = rollout.describe()
        assert (state.breaker, state.failures) == ("open", 5)

    run(scenario())


def test_a_canary_that_refuses_images_is_no_failure_of_it():
    async def scenario() -> None:
        rollout, _, _, _ = made("canary", Handle())
        for _ in range(7):
            with pytest.raises(ImageError):
                await rollout.grade(b"no image")
        assert rollout.describe().breaker == "closed"

    run(scenario())


def test_a_breaker_tries_again_after_a_while_one_call_at_a_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: now))
    one = CircuitBreaker(failures=2, of=4, pause_s=30)
    for end in (
        one.record_failure,
        one.record_success,
        one.record_success,
        one.record_success,
        one.record_failure,
    ):
        assert one.allows()
        end()
    assert one.state == "closed"  # the first failure is not among the last four
    assert one.allows()
    one.record_failure()
    assert (one.state, one.allows()) == ("open", False)
    now = 31
    assert (one.state, one.allows(), one.allows()) == ("half_open", True, False)
    one.record_cancel()
    assert one.allows()
    one.record_failure()
    assert not one.allows()
    now = 62
    assert one.allows()
    one.record_success()
    assert (one.state, one.failures, one.allows()) == ("closed", 0, True)


def test_a_slow_shadow_refuses_nobody_and_is_not_measured():
    async def scenario() -> None:
        shadow = Handle(3600)
        rollout, _, load, metrics = made("shadow", shadow)
        await asyncio.gather(*(rollout.grade(jpeg(seed)) for seed in range(40)))
        await asyncio.sleep(1)
        assert shadow.asked == 32  # as many copies as are kept
        assert load.retry_after() == 1
        load.in_flight.take("", 8)
        load.check()
        assert metrics.decoded == 40  # copies are not decoded again

    run(scenario())


def test_a_shadow_that_takes_other_pixels_gets_them():
    async def scenario() -> None:
        shadow = Handle(preprocess=Preprocess(size=96))
        rollout, _, _, metrics = made("shadow", shadow)
        await rollout.grade(jpeg(0))
        while not shadow.asked:
            await asyncio.sleep(0.01)
        assert metrics.decoded == 2

    run(scenario())


def test_what_needs_no_pass_is_not_waited_for_for_ever():
    async def scenario() -> None:
        graders = GraderClient(Handle(3600), Load(Limits()), Metrics(), Decoders())
        async with asyncio.timeout(60):
            with pytest.raises(Refusal) as refused:
                await graders.call_with_timeout("describe")
        assert (refused.value.status_code, refused.value.code) == (503, "not_ready")

    run(scenario())


def test_a_candidate_without_a_bundle_is_named_at_the_start(tmp_path):
    settings = Settings(candidate=CandidateSettings(mode="shadow"), audit={"folder": str(tmp_path)})
    with pytest.raises(UserError, match="add --shadow BUNDLE"):
        app.start("nowhere", "127.0.0.1", 0, settings)
