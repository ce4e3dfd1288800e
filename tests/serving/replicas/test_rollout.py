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
        names = ("grade", "preprocess", "describe", "find_cached")
        self.grade, self.preprocess, self.describe, self.find_cached = map(self._method, names)

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


def test_a_cached_answer_is_that_of_the_model_which_grades_the_image():
    async def scenario() -> None:
        for mode, failures, expected in (("canary", 0, (0, 1)), ("canary", 5, (1, 0)), ("shadow", 0, (1, 0))):
            candidate = Handle()
            rollout, first, _, _ = made(mode, candidate)
            candidate.error = RuntimeError("it failed")
            for seed in range(failures):
                await rollout.grade(jpeg(seed))
            candidate.error = None
            first.asked = candidate.asked = 0
            await rollout.find_cached("00" * 32)
            assert (first.asked, candidate.asked) == expected

    run(scenario())


def test_a_canary_that_refuses_images_is_no_failure_of_it():
    async def scenario() -> None:
        rollout, _, _, _ = made("canary", Handle())
        for _ in range(7):
            with pytest.raises(ImageError):
                await rollout.grade(b"no image")
        assert rollout.describe().breaker == "closed"

    run(scenario())


def test_a_canary_that_failed_is_tried_again_after_a_while_with_one_image():
    async def scenario() -> None:
        candidate = Handle()
        rollout, *_ = made("canary", candidate)
        candidate.error = RuntimeError("broken")
        for _ in range(8):
            await rollout.grade(jpeg(0))
        assert (candidate.asked, rollout.describe().breaker) == (5, "open")
        await asyncio.sleep(31)
        assert rollout.describe().breaker == "half_open"
        for _ in range(3):
            await rollout.grade(jpeg(0))
        assert (candidate.asked, rollout.describe().breaker) == (6, "open")
        await asyncio.sleep(31)
        candidate.error, candidate.seconds = None, 1
        await asyncio.gather(*(rollout.grade(jpeg(0)) for _ in range(3)))
        assert candidate.asked == 7
        state = rollout.describe()
        assert (state.breaker, state.failures) == ("closed", 0)

    run(scenario())


def test_old_failures_of_a_canary_are_forgotten():
    async def scenario() -> None:
        candidate = Handle()
        rollout, *_ = made("canary", candidate)
        for number in range(50):
            candidate.error = RuntimeError("broken") if number % 5 == 0 else None
            await rollout.grade(jpeg(0))
        assert candidate.asked == 50
        assert rollout.describe().failures == 4

    run(scenario())


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
