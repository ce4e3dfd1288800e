"""Backpressure: the queues between a client and the application are bounded."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy
from ray.serve._private.http_util import ASGIReceiveProxy, MessageQueue

from serving.http.backpressure import bound_request_queues

PIECE = {"type": "http.request", "body": b"x", "more_body": True}
LENGTH = 20  # messages; a little more than a queue holds


@pytest.fixture(autouse=True)
def held_back():
    bound_request_queues()
    bound_request_queues()


async def settle(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task], timeout=0.1)


def test_the_process_that_listens_takes_in_no_more_than_a_queue():
    async def run() -> None:
        queue, put = MessageQueue(), 0

        async def client() -> None:
            nonlocal put
            for _ in range(100):
                await queue(PIECE)
                put += 1

        sending = asyncio.create_task(client())
        await settle(sending)
        assert put < LENGTH
        taken = 0
        while taken < 100:
            await queue.wait_for_message()
            taken += len(queue.get_messages_nowait())
            assert put - taken < LENGTH
        await sending

    asyncio.run(run())


def test_answers_are_not_held_back():
    async def run() -> None:
        queue = MessageQueue()
        async with asyncio.timeout(1):
            for _ in range(100):
                await queue({"type": "http.response.body", "body": b"x", "more_body": True})

    asyncio.run(run())


@pytest.mark.parametrize("direct", [False, True])
def test_a_replica_fetches_no_more_than_a_queue(direct):
    async def run() -> None:
        fetched = 0

        async def receive() -> dict[str, Any]:
            nonlocal fetched
            fetched += 1
            return PIECE if fetched < 100 else {"type": "http.disconnect"}

        async def receive_pickled(_metadata: object) -> bytes:
            return pickle.dumps([await receive()])

        if direct:
            proxy = ASGIDIReceiveProxy({"type": "http"}, receive, asyncio.get_running_loop())
            fetching = proxy.fetch_until_disconnect_task()
        else:
            proxy = ASGIReceiveProxy({"type": "http"}, None, receive_pickled)
            fetching = asyncio.create_task(proxy.fetch_until_disconnect())
        await settle(fetching)
        assert fetched < LENGTH
        for taken in range(99):
            assert (await proxy())["type"] == "http.request"
            assert fetched - taken < LENGTH
        assert (await proxy())["type"] == "http.disconnect"

    asyncio.run(run())
