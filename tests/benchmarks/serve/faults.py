"""Kill a grader replica under load, and count failed calls of the client, with and without retries."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import cycle
from typing import Any

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
    images, durations = cycle(files), list[float]()
    until = time.monotonic() + seconds
    async with AsyncClient(server.url) as client:

        async def caller() -> None:
            while time.monotonic() < until:
                started = time.monotonic()
                try:
                    await client.grade(next(images))
                except GradeError:
                    continue
                durations.append(time.monotonic() - started)

        calls = asyncio.gather(*(caller() for _ in range(concurrency)))
        await asyncio.sleep(seconds / 3)
        graders = server.processes(GRADER)
        os.kill(graders[0], signal.SIGKILL)
        await calls
        counts = client.counts
    return {
        "what": "a grader killed",
        "load": "closed, with the client",
        "concurrency": concurrency,
        "graders": len(graders),
        "requests": counts.calls,
        "attempts": counts.attempts,
        "failed": counts.failed,
        "failed_without_retries": counts.failed_at_first,
        "longest_ms": round(1000 * max(durations), 1),
    }
