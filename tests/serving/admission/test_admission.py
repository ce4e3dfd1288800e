"""Admission: limits of pixels, fairness between owners, cheap probes; with the real parts, without Ray."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Awaitable
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

from scalp_core.errors import ImageError
from scalp_core.images import codecs
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.predictor import Predictor
from serving.admission.decoding import SMALL_COST, Decoders
from serving.admission.fairness import FairQueue
from serving.admission.limits import Limits, Load
from serving.admission.rate_limit import Admission, TokenBuckets
from serving.api.routes import create_api
from serving.batch.window import Batches, BatchSettings, RequestLimit, Window
from serving.http import request_context
from serving.http.problems import Refusal
from serving.replicas.grader import Grader
from serving.replicas.handles import decode_image
from serving.replicas.ingress import replica
from serving.replicas.readiness import Readiness
from serving.settings import Scaling, Settings
from tests.support import virtual_time
from tests.support.images import jpeg

SETTINGS = Settings(
    device="cpu",
    precision="fp32",
    threads=2,
    grader=Scaling(target_ongoing_requests=4, max_ongoing_requests=64, max_queued_requests=8),
)


def encoded(width: int, height: int, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def run(scenario: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def as_owner(owner: str) -> None:
    request_context.set_current(request_context.RequestContext("id", owner=owner))


# --- probes


@pytest.mark.medium
def test_probes_cost_no_forward_pass(bundle, monkeypatch):
    passes = []
    warm_up = Predictor.warm_up
    monkeypatch.setattr(Predictor, "warm_up", lambda self, n: (passes.append(n), warm_up(self, n)))

    async def scenario() -> None:
        grader = Grader(SETTINGS)
        await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
        passes.clear()
        readiness = Readiness(grader.check_ready)
        app = create_api(SETTINGS, Load(SETTINGS.limits), None)
        app.dependency_overrides[replica] = lambda: SimpleNamespace(is_ready=readiness.is_ready)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answers = await asyncio.gather(*(client.get("/readyz") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        assert not passes
        await grader.check_health()  # what Ray asks is still the model
        assert passes == [1]

    run(scenario())


def test_a_model_that_fails_its_check_is_not_ready(bundle, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    async def scenario() -> None:
        grader = Grader(SETTINGS)
        await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
        await grader.check_ready()
        monkeypatch.setattr(Predictor, "warm_up", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            await grader.check_health()
        with pytest.raises(RuntimeError, match="out of memory"):
            await grader.check_ready()
        assert not await Readiness(grader.check_ready).is_ready()

    run(scenario())


def test_an_old_result_is_not_an_answer(monkeypatch):
    monkeypatch.setattr("serving.replicas.readiness._ANSWER_WITHIN_S", 3600)

    async def scenario() -> None:
        asked = 0

        async def check() -> None:
            nonlocal asked
            asked += 1
            if asked > 1:
                await asyncio.sleep(3600)

        readiness = Readiness(check)
        assert all(await asyncio.gather(*(readiness.is_ready() for _ in range(100))))
        await asyncio.sleep(20)
        assert not await readiness.is_ready()
        assert asked == 2  # one task, however many probes

    virtual_time.run(scenario())


# --- pixels


def test_decoding_is_weighed_by_format():
    plain, png = encoded(4000, 3000, "JPEG"), encoded(4000, 3000, "PNG")
    scans = encoded(4000, 3000, "JPEG", progressive=True)
    assert codecs.read_header(plain).cost == pytest.approx(12 / 8)
    assert codecs.read_header(png).cost == pytest.approx(12)
    assert 12 / 8 < codecs.read_header(scans).cost < 12
    for name in ("WEBP", "BMP", "TIFF"):
        header = codecs.read_header(encoded(300, 200, name))
        assert (header.kind, header.width, header.height) == (name, 300, 200)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("size", "kind", "is_let_in"),
    [
        ((4032, 3024), "JPEG", True),
        ((8000, 6000), "JPEG", True),
        ((4032, 3024), "PNG", True),
        ((7000, 7000), "PNG", False),
    ],
)
def test_what_telephones_take_is_let_in_and_a_large_png_is_named(size, kind, is_let_in):
    async def scenario() -> None:
        admission = Admission(Limits(), Decoders())
        data = encoded(*size, kind)
        if is_let_in:
            assert await admission.measure("ann", data) <= Limits().max_megapixels
            return
        with pytest.raises(ImageError) as refused:
            await admission.measure("ann", data)
        assert refused.value.code == "too_many_pixels"
        assert "7000x7000" in refused.value.message and "12,500,000" in refused.value.message

    run(scenario())


def test_large_images_do_not_keep_small_ones_waiting():
    async def scenario() -> None:
        decoders, release = Decoders(), threading.Event()
        large = [
            asyncio.create_task(decoders.run("greedy", 2 * SMALL_COST, release.wait, 20)) for _ in range(8)
        ]
        await asyncio.sleep(0.05)
        small = decoders.run("modest", 0.1, decode_image, jpeg(0), Preprocess(size=64))
        assert (await asyncio.wait_for(small, 10)).decoded.pixels.shape == (64, 64, 3)
        release.set()
        await asyncio.gather(*large)

    run(scenario())


def test_one_large_image_is_decoded_at_a_time_in_rotation_of_owners():
    async def scenario() -> None:
        decoders, order, together, release = Decoders(), [], [], threading.Event()

        def work(owner: str) -> None:
            together.append(owner)
            assert len(together) == 1
            order.append(owner)
            together.remove(owner)

        owners = ["greedy"] * 20 + ["modest"]
        first = asyncio.create_task(decoders.run("greedy", 5, release.wait, 20))
        jobs = [asyncio.create_task(decoders.run(owner, 5, work, owner)) for owner in owners]
        await asyncio.sleep(0)  # now all are queued
        release.set()
        await asyncio.gather(first, *jobs)
        assert order.index("modest") <= 1

    run(scenario())


def test_a_client_that_goes_away_gives_its_turn_back():
    async def scenario() -> None:
        decoders, release = Decoders(), threading.Event()
        running = asyncio.create_task(decoders.run("ann", 5, release.wait, 20))
        waiting = asyncio.create_task(decoders.run("ann", 5, release.wait, 20))
        await asyncio.sleep(0.05)
        running.cancel()
        waiting.cancel()
        release.set()
        assert await decoders.run("ben", 5, lambda: 7) == 7

    run(scenario())


def test_buckets_take_as_much_as_is_asked_or_nothing():
    buckets = TokenBuckets(per_minute=600, burst=60)
    assert buckets.take("ann", 0, 50) == 0
    assert buckets.take("ann", 0, 12) == pytest.approx(0.2)
    assert buckets.take("ann", 0, 10) == 0
    assert buckets.take("ben", 0, 60) == 0


def test_an_owner_out_of_budget_is_told_when_to_come_back():
    admission = Admission(Limits(megapixels_per_minute=60), Decoders())
    admission.take("ann", 12)
    with pytest.raises(Refusal) as refused:
        admission.take("ann", 10)
    assert (refused.value.status_code, refused.value.code) == (429, "pixel_budget")
    assert refused.value.headers["Retry-After"] == "10"
    admission.take("ben", 10)


@pytest.mark.medium
def test_a_batch_is_paced_by_the_budget_and_bounded_in_all():
    async def scenario() -> None:
        limits = Limits(megapixels_per_minute=60)
        settings = BatchSettings(megapixels=30)
        batches = Batches(settings, None, None, Admission(limits, Decoders()))
        as_owner("ann")
        began, total = asyncio.get_running_loop().time(), 0.0
        for _ in range(2):
            total = await batches.admit(encoded(4000, 3000, "PNG"), total)
        assert await batches.admit(encoded(7000, 7000, "PNG"), total) == total  # refused, for nothing
        with pytest.raises(Refusal) as refused:
            await batches.admit(encoded(4000, 3000, "PNG"), total)
        seconds = asyncio.get_running_loop().time() - began
        assert seconds == pytest.approx(23.5)  # 12.5 in a row, then 23.5 megapixels at 1 per second
        assert (refused.value.status_code, refused.value.code) == (413, "too_many_pixels")

    virtual_time.run(scenario())


# --- shares


def test_a_queue_is_taken_from_in_rotation():
    queue: FairQueue[int] = FairQueue()
    for number in range(5):
        queue.push("greedy", number)
    queue.push("modest", 9)
    assert [queue.pop() for _ in range(3)] == [0, 9, 1]
    assert queue.count(without={"greedy"}) == 0 and len(queue) == 3
    with pytest.raises(LookupError):
        queue.pop(without={"greedy"})


def test_no_owner_takes_all_the_places_of_batches_and_archives():
    batches, archives = RequestLimit(8, "batches"), RequestLimit(2, "archives")
    places = [batches.reserve("greedy") for _ in range(4)]
    for each in places:
        each.__enter__()
    with pytest.raises(Refusal, match="too many batches"), batches.reserve("greedy"):
        pass
    with (
        batches.reserve("modest"),
        archives.reserve("greedy"),
        archives.reserve("modest"),
        pytest.raises(Refusal),
    ):
        archives.reserve("greedy").__enter__()
    with RequestLimit(1, "archives").reserve("greedy"):  # at least one
        pass


def test_no_owner_fills_the_window():
    async def scenario() -> None:
        window = Window(8, 10**6)
        entered = [asyncio.create_task(window.enter("greedy", 10)) for _ in range(8)]
        await asyncio.sleep(0.01)
        assert sum(task.done() for task in entered) == 4
        await window.enter("modest", 10)
        window.leave("greedy", 10)
        await asyncio.sleep(0.01)
        assert sum(task.done() for task in entered) == 5
        for task in entered:
            task.cancel()

    virtual_time.run(scenario())


def test_a_lone_photograph_does_not_wait_for_a_full_queue_of_another_owner(bundle, monkeypatch):
    """The other owner has 40 images in the queue and a hanging pass in one lane; the second lane is free."""
    full_pass_began, release, logits = threading.Event(), threading.Event(), Predictor.logits

    def slow(predictor: Predictor, images: np.ndarray) -> np.ndarray:
        if len(images) > 1:
            full_pass_began.set()
            release.wait(20)
        return logits(predictor, images)

    async def scenario() -> None:
        grader = Grader(SETTINGS)
        await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
        preprocess = await grader.preprocess()
        black = np.zeros((preprocess.size, preprocess.size, 3), np.uint8)
        statistics = np.zeros(len(decode_image(jpeg(0), preprocess).statistics))
        await grader.grade(black + 1, statistics, preprocess, "modest")
        monkeypatch.setattr(Predictor, "logits", slow)
        many = [asyncio.create_task(grader.grade(black, statistics, preprocess, "greedy")) for _ in range(40)]
        # An image that comes earlier, during the first one's pass, may join the full pass.
        assert await asyncio.to_thread(full_pass_began.wait, 10)
        one = await asyncio.wait_for(grader.grade(black + 1, statistics, preprocess, "modest"), 10)
        assert one.batch_size == 1
        assert sum(task.done() for task in many) <= 1  # the first, which came alone
        release.set()
        await asyncio.gather(*many)

    run(scenario())
