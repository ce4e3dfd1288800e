"""The queue of a request's body between HAProxy and the application is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve._private import constants
from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy

from cluster.ray_internals import bound_request_queue

LENGTH = 20  # messages; a little more than the queue holds


def test_a_replica_receives_no_more_than_a_queue(monkeypatch):
    monkeypatch.setattr(ASGIDIReceiveProxy, "queue", ASGIDIReceiveProxy.queue)  # restored after the test
    monkeypatch.setattr(constants, "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", False)
    bound_request_queue()

    async def run() -> None:
        received = 0

        async def receive() -> dict[str, Any]:
            nonlocal received
            received += 1
            if received < 100:
                return {"type": "http.request", "body": b"x", "more_body": True}
            return {"type": "http.disconnect"}

        proxy = ASGIDIReceiveProxy({"type": "http"}, receive, asyncio.get_running_loop())
        fetching = proxy.fetch_until_disconnect_task()
        await asyncio.wait([fetching], timeout=0.1)
        assert received < LENGTH
        for taken in range(99):
            assert (await proxy())["type"] == "http.request"
            assert received - taken < LENGTH
        assert (await proxy())["type"] == "http.disconnect"

    asyncio.run(run())
