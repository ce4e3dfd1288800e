"""Grader: dynamic batches, and a change of the model while it grades."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from serving.replicas.grader import Grader
from serving.schemas.grading import Graded
from serving.settings import Scaling, Settings
from tests.support.images import jpeg
from tests.support.virtual_time import advance, run

SETTINGS = Settings(
    device="cpu",
    precision="fp32",
    grader=Scaling(target_ongoing_requests=4, max_ongoing_requests=16, max_queued_requests=8),
    wedged_seconds=1,
)


async def started(bundle, settings: Settings = SETTINGS, **options) -> Grader:
    grader = Grader(settings)
    await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4} | options)
    return grader


async def grade(grader: Grader, seed: int) -> Graded:
    preprocess = await grader.preprocess()
    pixels = decode(jpeg(seed), preprocess).pixels
    return await grader.grade(pixels, image_statistics.measure(pixels), preprocess)


@pytest.fixture
def other_bundle(make_bundle, tmp_path):
    return make_bundle(tmp_path / "other")


def test_requests_that_come_during_a_pass_share_the_next_one(bundle):
    async def scenario() -> None:
        grader = await started(bundle)
        found = await asyncio.gather(*(grade(grader, seed) for seed in range(9)))
        assert sorted(each.batch_size for each in found) == [1, 4, 4, 4, 4, 4, 4, 4, 4]
        predictor = Predictor(load_bundle(str(bundle)), "cpu", "fp32")
        for seed, each in enumerate(found):
            pixels = decode(jpeg(seed), predictor.spec.preprocess).pixels
            truth = predictor.grade(pixels[None])[0]
            assert each.grading.probabilities == pytest.approx(truth.probabilities, abs=1e-5)
        assert (await grade(grader, 0)).batch_size == 1  # alone, it waits for nobody

    run(scenario())


def test_when_there_are_as_many_as_threads_each_thread_has_passes_of_its_own(bundle):
    async def scenario() -> None:
        grader = await started(bundle, SETTINGS.model_copy(update={"threads": 2}))
        found = await asyncio.gather(*(grade(grader, seed) for seed in range(9)))
        assert sorted(each.batch_size for each in found) == [1, 4, 4, 4, 4, 4, 4, 4, 4]
        one_by_one = [await grade(grader, seed) for seed in range(9)]
        for some, other in zip(found, one_by_one, strict=True):
            assert some.grading.probabilities == pytest.approx(other.grading.probabilities, abs=1e-5)

    run(scenario())


@pytest.mark.medium
def test_nobody_is_forgotten_however_many_wait_for_the_lanes(bundle):
    async def scenario() -> None:
        grader = await started(bundle, SETTINGS.model_copy(update={"threads": 3}))
        for count in range(1, 14):
            found = asyncio.gather(*(grade(grader, seed) for seed in range(count)))
            assert len(await found) == count

    run(scenario())


def test_one_failed_pass_fails_its_own_and_ends_nothing(bundle, monkeypatch):
    logits = Predictor.logits

    def fail_on_black(predictor: Predictor, images: np.ndarray) -> np.ndarray:
        if not images.any():
            raise RuntimeError("the model failed")
        return logits(predictor, images)

    async def scenario() -> None:
        grader = await started(bundle)
        monkeypatch.setattr(Predictor, "logits", fail_on_black)
        preprocess = await grader.preprocess()
        black = np.zeros((preprocess.size, preprocess.size, 3), np.uint8)
        with pytest.raises(RuntimeError, match="the model failed"):
            await grader.grade(black, image_statistics.measure(black), preprocess)
        assert (await grade(grader, 1)).batch_size == 1

    run(scenario())


def test_another_bundle_takes_over_while_requests_are_answered(bundle, other_bundle):
    async def scenario() -> None:
        grader = await started(bundle)
        seen = [(await grade(grader, 0)).bundle]
        await grader.reconfigure({"bundle": str(other_bundle), "max_batch_size": 4})
        while seen[-1] != str(other_bundle):
            seen.append((await grade(grader, 0)).bundle)
        assert seen == sorted(seen, key=[str(bundle), str(other_bundle)].index)  # once, and for good
        assert seen.count(str(bundle)) > 1  # the first went on while the other was loaded

    run(scenario())


def test_a_photograph_made_for_the_model_before_is_asked_for_again(bundle):
    async def scenario() -> None:
        grader = await started(bundle)
        preprocess = await grader.preprocess()
        older = preprocess.model_copy(update={"size": 32})
        pixels = decode(jpeg(0), older).pixels
        assert await grader.grade(pixels, image_statistics.measure(pixels), older) == preprocess

    run(scenario())


@pytest.mark.promise("README: an invalid bundle changes nothing")
def test_a_bundle_that_cannot_be_loaded_ends_nothing_and_is_told(bundle, tmp_path):
    async def scenario() -> None:
        grader = await started(bundle)
        await grader.reconfigure({"bundle": str(tmp_path / "nothing"), "max_batch_size": 4})
        while not (error := (await grader.describe()).load_error):
            await asyncio.sleep(0.01)
        assert "is not a bundle" in error
        assert (await grade(grader, 0)).bundle == str(bundle)
        await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
        while (await grader.describe()).load_error:
            await asyncio.sleep(0.01)

    run(scenario())


def test_thresholds_change_while_it_runs(bundle):
    async def scenario() -> None:
        grader = await started(bundle, max_set_size=4, min_confidence=0)
        assert not (await grade(grader, 0)).grading.refer
        stricter = {"max_batch_size": 4, "max_set_size": 4, "min_confidence": 1}
        await grader.reconfigure({"bundle": str(bundle)} | stricter)
        while not (await grade(grader, 0)).grading.refer:
            await asyncio.sleep(0.01)
        assert (await grade(grader, 0)).grading.refer_reasons == ["low_confidence"]
        assert (await grader.describe()).referral.min_confidence == 1

    run(scenario())


def test_a_pass_that_does_not_end_is_noticed(bundle, monkeypatch):
    began, release = threading.Event(), threading.Event()

    async def scenario() -> None:
        grader = await started(bundle)
        await grader.check_health()
        monkeypatch.setattr(Predictor, "logits", lambda *_: began.set() or release.wait(30))
        wedged = asyncio.create_task(grade(grader, 0))
        assert await asyncio.to_thread(began.wait, 30)
        await advance(SETTINGS.wedged_seconds + 0.1)
        with pytest.raises(RuntimeError, match="hangs"):
            await grader.check_health()  # does not queue behind the hanging pass
        release.set()
        wedged.cancel()

    run(scenario())


def test_batches_that_could_never_fill_are_refused(bundle):
    with pytest.raises(ValueError, match="at least twice max_batch_size"):
        run(started(bundle, max_batch_size=9))


def test_a_grader_without_a_model_says_where_to_name_one():
    with pytest.raises(UserError, match="user_config"):
        run(Grader(SETTINGS).check_health())
