"""Kill a grader replica under load, and count failed calls of the client, with and without retries."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from itertools import cycle
from typing import Any

import httpx

from serving.client import AsyncClient, GradeError
from tests.benchmarks.serve.servers import Server

GRADER = "ray::ServeReplica:scalp:Grader"


def kill_a_grader(server: Server, files: list[bytes], concurrency: int, seconds: float) -> dict[str, Any]:
    """Send requests from parallel clients; after a third of the time, kill one grader with SIGKILL.

    Args:
        server: Server of `scalp serve`, awake.
        files: JPEG files.
        concurrency: Parallel clients.
        seconds: Duration in total.

    Returns:
        Row with calls, failures and the longest call.
    """
    return asyncio.run(_kill(server, files, concurrency, seconds))


async def _kill(server: Server, files: list[bytes], concurrency: int, seconds: float) -> dict[str, Any]:
    images, durations, failed = cycle(files), list[float](), 0
    until = time.monotonic() + seconds
    async with AsyncClient(server.url) as client:
        attempts = count_attempts(client)

        async def caller() -> None:
            nonlocal failed
            while time.monotonic() < until:
                started = time.monotonic()
                try:
                    await client.grade(next(images))
                except GradeError:
                    failed += 1
                    continue
                durations.append(time.monotonic() - started)

        calls = asyncio.gather(*(caller() for _ in range(concurrency)))
        await asyncio.sleep(seconds / 3)
        graders = server.processes(GRADER)
        os.kill(graders[0], signal.SIGKILL)
        await calls
    return {
        "what": "a grader killed",
        "load": "closed, with the client",
        "concurrency": concurrency,
        "graders": len(graders),
        "requests": len(attempts),
        "attempts": attempts.total(),
        "failed": failed,
        "failed_without_retries": sum(count > 1 for count in attempts.values()),
        "longest_ms": round(1000 * max(durations), 1),
    }


def count_attempts(client: AsyncClient) -> Counter[str]:
    """Count the requests of a client from now on, by the id of their call."""
    attempts: Counter[str] = Counter()

    async def count(request: httpx.Request) -> None:
        attempts[request.headers["X-Request-ID"]] += 1

    client._http.event_hooks = {"request": [count]}
    return attempts
