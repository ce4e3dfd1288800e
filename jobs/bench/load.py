"""Load generator: images over keep-alive HTTP connections, from one process.

`setup` or `setup_requests` prepares a separate process (`measure.OwnProcess`); the other functions run there.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count, cycle, takewhile
from typing import Any, NamedTuple

import aiohttp
import numpy as np

PATH = "/v1/grade"
BATCH_HEADER = "X-Batch-Size"

_BOUNDARY = "photograph-0d5e1f6c"
_TIMEOUT_S = 30.0
# After a lost connection: bounds the retries while a server is unavailable.
_PAUSE_S = 0.05


class Requests(NamedTuple):
    """Requests that are sent in turn; `path` begins with a slash."""

    path: str
    headers: dict[str, str]
    bodies: list[bytes]


@dataclass
class Load:
    """Result of one turn of load.

    Args:
        seconds: Measured seconds, without the warm-up.
        latencies: Seconds of each successful answer; in an open loop from the scheduled arrival.
        batches: `X-Batch-Size` of these answers: images in the forward pass.
        moments: Arrival of these answers, in seconds after `began`.
        errors: Measured requests without a successful answer: refused, lost or late.
        refusals: Moments of the errors with a Retry-After header.
        answers: Successful answers, including the warm-up, on which the servers' CPU was spent.
        cpu_seconds: CPU seconds of this process.
        began: Start of the measurement, by `time.perf_counter`.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    errors: int = 0
    refusals: list[float] = field(default_factory=list)
    answers: int = 0
    cpu_seconds: float = 0.0
    began: float = 0.0


def summarize(loads: list[Load]) -> dict[str, Any]:
    """Rate, latency, errors and batch size of several turns of the same load; ms where a name says so.

    Raises:
        ValueError: No request was answered.
    """
    latencies = [1000 * seconds for turn in loads for seconds in turn.latencies]
    if not latencies:
        raise ValueError("no request was answered")
    batches = [size for turn in loads for size in turn.batches]
    rates = [len(turn.latencies) / turn.seconds for turn in loads]
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).round(1).tolist()
    return {
        "requests_per_second": round(statistics.median(rates), 1),
        "of_each_turn": [round(rate, 1) for rate in rates],
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "errors": sum(turn.errors for turn in loads),
        # A forward pass of n images is in n answers.
        "batch_fill": round(len(batches) / sum(1 / size for size in batches), 2) if batches else None,
    }


_requests: Requests


def setup(files: list[bytes], key: str | None = None) -> None:
    """Make the requests to `/v1/grade` of these images, once."""
    setup_requests(make_requests(files, key))


def setup_requests(requests: Requests) -> None:
    """Set the requests to send."""
    global _requests
    _requests = requests


def make_requests(files: list[bytes], key: str | None = None) -> Requests:
    """Make requests to `/v1/grade` with one image each."""
    return Requests(PATH, headers(key), [form(data) for data in files])


def form(data: bytes) -> bytes:
    """Body of a form with one image."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    return f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()


def headers(key: str | None = None) -> dict[str, str]:
    """Headers of a request with such a form."""
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}", **authorization}


def closed(url: str, concurrency: int, warm_up: float, seconds: float) -> Load:
    """Closed loop: clients that send the next request after each answer, for `seconds` after `warm_up`."""
    return asyncio.run(_closed(url, concurrency, warm_up, seconds))


def open_loop(url: str, rate: float, warm_up: float, seconds: float, seed: int = 0) -> Load:
    """Open loop: requests arrive at random (Poisson), independent of answers.

    Latency is measured from the scheduled arrival, which avoids coordinated omission: a server that delays
    the clients does not get fewer requests. Servers at the same `rate` (per second) get the same arrivals.
    """
    return asyncio.run(_open(url, rate, warm_up, seconds, seed))


def answers(url: str) -> list[dict[str, Any]]:
    """Answers of the server for all images, one after the other.

    Raises:
        RuntimeError: The server refuses one.
    """
    return asyncio.run(_answers(url))


async def _answers(url: str) -> list[dict[str, Any]]:
    parsed = []
    async with _session(url) as session:
        for data in _requests.bodies:
            async with session.post(_requests.path[1:], data=data) as answer:
                body = await answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{url} answers {answer.status}: {body.decode()[:500]}")
            parsed.append(json.loads(body))
    return parsed


async def _closed(url: str, concurrency: int, warm_up: float, seconds: float) -> Load:
    cpu, result = time.process_time(), Load(seconds)
    begin = time.perf_counter() + warm_up
    end, bodies, result.began = begin + seconds, cycle(_requests.bodies), begin

    async def client(session: aiohttp.ClientSession) -> None:
        while (sent := time.perf_counter()) < end:
            if not await _send(session, next(bodies), sent, result, (begin, end)):
                await asyncio.sleep(_PAUSE_S)

    async with _session(url) as session:
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
    result.cpu_seconds = time.process_time() - cpu
    return result


async def _open(url: str, rate: float, warm_up: float, seconds: float, seed: int) -> Load:
    cpu, result = time.process_time(), Load(seconds)
    start = time.perf_counter()
    begin, bodies = start + warm_up, cycle(_requests.bodies)
    result.began = begin
    async with _session(url) as session, asyncio.TaskGroup() as tasks:
        for arrival in _arrivals(rate, warm_up + seconds, seed):
            due = start + arrival
            await asyncio.sleep(due - time.perf_counter())
            counted = (due, float("inf")) if due >= begin else (0.0, 0.0)
            tasks.create_task(_send(session, next(bodies), due, result, counted))
    result.cpu_seconds = time.process_time() - cpu
    return result


def _arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    rng = random.Random(seed)  # noqa: S311
    return takewhile(lambda at: at < seconds, accumulate(rng.expovariate(rate) for _ in count()))


def _session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        f"{url.rstrip('/')}/",
        connector=aiohttp.TCPConnector(limit=0),
        headers=_requests.headers,
        timeout=aiohttp.ClientTimeout(_TIMEOUT_S),
    )


async def _send(
    session: aiohttp.ClientSession, data: bytes, since: float, result: Load, counted: tuple[float, float]
) -> bool:
    """Send one request, and count its answer if it arrives within `counted`; return whether there is one."""
    answer = None
    try:
        async with session.post(_requests.path[1:], data=data) as answer:
            await answer.read()
        is_success = answer.status == 200
    except (OSError, TimeoutError, aiohttp.ClientError):
        is_success = False
    now = time.perf_counter()
    result.answers += is_success
    if counted[0] <= now < counted[1]:
        if answer and is_success:
            result.latencies.append(now - since)
            result.moments.append(now - result.began)
            batch = int(answer.headers.get(BATCH_HEADER, 0))
            result.batches += [batch] if batch else []
        else:
            result.errors += 1
            if answer and "Retry-After" in answer.headers:
                result.refusals.append(now - result.began)
    return answer is not None
