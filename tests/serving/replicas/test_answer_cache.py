"""Cached answers are equal, end with their model, belong to one owner, and take bounded memory."""

from __future__ import annotations

import asyncio
import tracemalloc

import numpy as np

from scalp_core.images import statistics as image_statistics
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import NOT_FINITE, REASONS, Grading
from serving.observability.metrics import GraderMetrics
from serving.replicas.answer_cache import ENTRY_BYTES, AnswerCache, CachedAnswer
from serving.replicas.grader import Grader
from serving.replicas.handles import decode_image
from serving.schemas.grading import Graded
from serving.settings import Settings
from tests.support.images import jpeg
from tests.support.virtual_time import run

ANN, BEN = "ann", "ben"


def answer(*reasons: str) -> CachedAnswer:
    """A new answer, as large as they are."""
    grading = Grading(
        int("2"),
        "moderate",
        [0.1 * n for n in range(4)],
        1.8 * len(reasons),
        [1, 2],
        0.7,
        True,
        list(reasons),
    )
    return CachedAnswer(grading, ("first_frame_only",), np.zeros(len(STATISTICS), np.float32))


async def started(bundle, cache_mib: int) -> Grader:
    grader = Grader(Settings(device="cpu", precision="fp32", cache_mib=cache_mib))
    await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
    return grader


async def grade(grader: Grader, owner: str) -> tuple[str, Graded]:
    preprocess = await grader.preprocess()
    image = decode_image(jpeg(0), preprocess)
    statistics = image_statistics.measure(image.decoded.pixels)
    pixels, notes = image.decoded
    return image.sha256, await grader.grade(pixels, statistics, preprocess, owner, image.sha256, tuple(notes))


def test_an_answer_is_kept_for_its_owner_until_the_model_or_its_settings_change(bundle):
    async def scenario() -> None:
        grader = await started(bundle, cache_mib=1)
        sha256, graded = await grade(grader, ANN)
        cached, notes = await grader.find_cached(sha256, ANN)
        assert (cached.grading, cached.signature, cached.bundle) == graded[:3] and notes == ()
        assert cached.batch_size == 0
        assert await grader.find_cached(sha256, BEN) is None
        await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4, "min_confidence": 1.0})
        while await grader.find_cached(sha256, ANN):
            await asyncio.sleep(0.01)
        assert (await grade(grader, ANN))[1].grading.refer
        assert (await grader.find_cached(sha256, ANN))[0].grading.refer

    run(scenario())


def test_lookups_are_counted_and_hits_count_as_graded(bundle, monkeypatch):
    lookups, graded = [], []
    monkeypatch.setattr(GraderMetrics, "observe_lookup", lambda _, is_hit: lookups.append(is_hit))
    count = GraderMetrics.observe_gradings

    def observe(metrics: GraderMetrics, gradings: list[Grading], statistics: list[np.ndarray]) -> None:
        graded.append((gradings[0], statistics[0].tolist()))
        count(metrics, gradings, statistics)

    monkeypatch.setattr(GraderMetrics, "observe_gradings", observe)

    async def scenario() -> None:
        grader = await started(bundle, cache_mib=1)
        await grader.find_cached("00" * 32, ANN)
        sha256, _ = await grade(grader, ANN)
        await grader.find_cached(sha256, ANN)

    run(scenario())
    assert lookups == [False, True]
    assert graded == [graded[0]] * 2


def test_nothing_is_kept_unless_it_is_wanted(bundle):
    async def scenario() -> None:
        grader = await started(bundle, cache_mib=0)
        sha256, _ = await grade(grader, ANN)
        assert await grader.find_cached(sha256, ANN) is None

    run(scenario())


def test_an_answer_of_a_model_that_failed_is_not_kept():
    cache = AnswerCache(1)
    cache.put(ANN, "00" * 32, answer(NOT_FINITE))
    cache.put(ANN, "", answer())
    assert len(cache) == 0


def test_the_memory_is_bounded_and_the_oldest_answers_go_first():
    cache, mib = AnswerCache(2), 2
    names = [f"{number:064x}" for number in range(5000)]
    tracemalloc.start()
    for name in names:
        cache.put(ANN, name, answer(*REASONS.keys() - {NOT_FINITE}))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(cache) == mib * 2**20 // ENTRY_BYTES < len(names)
    assert used < mib * 2**20
    assert cache.get(ANN, names[0]) is None and cache.get(ANN, names[-1]) is not None
