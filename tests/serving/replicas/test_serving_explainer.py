"""Explainer: how often it loads a bundle, and which bundle it evicts."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from scalp_core.errors import UserError
from serving.replicas import explainer
from serving.replicas.explainer import Explainer

IMAGE = np.zeros((8, 8, 3), np.uint8)


class Loader:
    """Load stand-ins for bundles and record their names; each load waits for `may_finish`."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.broken: set[str] = set()
        self.may_finish = threading.Event()
        self.may_finish.set()

    def __call__(self, bundle: str) -> SimpleNamespace:
        self.loaded.append(bundle)
        assert self.may_finish.wait(10)
        if bundle in self.broken:
            raise UserError(f"{bundle} has no map")
        return SimpleNamespace(heatmap=lambda image, _grade: np.zeros(image.shape[:2], np.float32))


@pytest.fixture
def loader(monkeypatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr(explainer, "load_bundle", lambda bundle: bundle)
    monkeypatch.setattr(
        "scalp_core.inference.explainer.make_explainer", lambda bundle, _device: loader(bundle)
    )
    return loader


async def start(replica: Explainer, bundle: str) -> asyncio.Task[bytes]:
    """Start a heatmap that waits for its bundle."""
    task = asyncio.create_task(replica.heatmap(IMAGE, 0, bundle))
    await asyncio.sleep(0)
    return task


def test_concurrent_requests_load_a_bundle_once(loader):
    async def scenario() -> None:
        replica = Explainer()
        loader.may_finish.clear()
        tasks = [await start(replica, "a") for _ in range(4)]
        loader.may_finish.set()
        assert len(set(await asyncio.gather(*tasks))) == 1

    asyncio.run(scenario())
    assert loader.loaded == ["a"]


def test_the_least_recently_used_bundle_is_evicted(loader):
    async def scenario() -> None:
        replica = Explainer()
        for bundle in "abacaba":
            await replica.heatmap(IMAGE, 0, bundle)

    asyncio.run(scenario())
    assert loader.loaded == ["a", "b", "c", "b"]


def test_more_bundles_than_are_kept_are_all_answered_when_they_load_at_the_same_time(loader):
    async def scenario() -> None:
        replica = Explainer()
        loader.may_finish.clear()
        tasks = [await start(replica, bundle) for bundle in "pqrs"]
        loader.may_finish.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert sorted(loader.loaded) == ["p", "q", "r", "s"]


def test_a_client_that_leaves_does_not_cancel_the_load_of_others(loader):
    async def scenario() -> None:
        replica = Explainer()
        loader.may_finish.clear()
        first, second = [await start(replica, "a") for _ in range(2)]
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        loader.may_finish.set()
        assert (await second).startswith(b"\x89PNG")

    asyncio.run(scenario())
    assert loader.loaded == ["a"]


def test_a_failed_load_is_tried_again_by_the_next_request(loader):
    async def scenario() -> None:
        replica = Explainer()
        loader.broken.add("a")
        await replica.reconfigure({"bundle": "a"})  # the error belongs to the request
        with pytest.raises(UserError, match="a has no map"):
            await replica.heatmap(IMAGE, 0, "a")
        loader.broken.clear()
        await replica.heatmap(IMAGE, 0, "a")

    asyncio.run(scenario())
    assert loader.loaded == ["a", "a", "a"]
