"""Load generator: images over keep-alive HTTP connections, from one process with little CPU use.

`setup` makes the requests in a separate process (`measure.OwnProcess`), in which the other functions run.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count, cycle, takewhile
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools
import numpy as np

PATH = "/v1/grade"
BATCH_HEADER = "X-Batch-Size"

_BOUNDARY = "photograph-0d5e1f6c"
_TIMEOUT_S = 30.0
# After a lost connection: bounds the retries while a server is unavailable.
_PAUSE_S = 0.05


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


@dataclass(frozen=True)
class Answer:
    """Answer of a server."""

    status: int
    batch: int
    body: bytes
    has_retry_after: bool


LOOPBACK = urlsplit("http://127.0.0.1")

_requests: list[bytes]
_host: str
_tls: ssl.SSLContext | None


def setup(files: list[bytes], key: str | None = None, url: str = LOOPBACK.geturl()) -> None:
    """Make the requests of these images, once.

    Args:
        files: Images.
        key: API key.
        url: Base URL of the server, whose port is given with each load.
    """
    global _requests, _host, _tls
    base = urlsplit(url)
    _host = base.hostname or ""
    _tls = ssl.create_default_context() if base.scheme == "https" else None
    _requests = [request(data, key, base) for data in files]


def request(data: bytes, key: str | None = None, base: SplitResult = LOOPBACK) -> bytes:
    """Whole HTTP/1.1 request that posts one image as a form."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
    start = f"POST {base.path.rstrip('/')}{PATH} HTTP/1.1\r\nHost: {base.netloc}\r\n"
    start += f"Content-Length: {len(body)}\r\n"
    start += f"Authorization: Bearer {key}\r\n" if key else ""
    return f"{start}Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n\r\n".encode() + body


def closed(port: int, concurrency: int, warm_up: float, seconds: float) -> Load:
    """Closed loop: clients that send the next request after each answer.

    Args:
        port: Port of the server.
        concurrency: Number of clients.
        warm_up: Seconds before the measurement.
        seconds: Seconds of the measurement.
    """
    return asyncio.run(_closed(port, concurrency, warm_up, seconds))


def open_loop(port: int, rate: float, warm_up: float, seconds: float, seed: int = 0) -> Load:
    """Open loop: requests arrive at random (Poisson), independent of answers.

    Latency is measured from the scheduled arrival, which avoids coordinated omission: a server that delays
    the clients does not get fewer requests.

    Args:
        port: Port of the server.
        rate: Mean arrivals per second.
        warm_up: Seconds before the measurement.
        seconds: Seconds of the measurement.
        seed: Random seed of the arrivals, equal for servers at the same rate.
    """
    return asyncio.run(_open(port, rate, warm_up, seconds, seed))


def answers(port: int) -> list[dict[str, Any]]:
    """Answers of the server for all images, one after the other.

    Raises:
        RuntimeError: The server refuses one.
    """
    return asyncio.run(_answers(port))


async def _answers(port: int) -> list[dict[str, Any]]:
    connection, bodies = await _connect(port), []
    for data in _requests:
        if not connection.alive:  # a server may close one that is idle, or while it scales
            connection = await _connect(port)
        answer = await connection.post(data)
        if answer.status != 200:
            raise RuntimeError(f"port {port} answers {answer.status}: {answer.body.decode()[:500]}")
        bodies.append(json.loads(answer.body))
    connection.close()
    return bodies


async def _closed(port: int, concurrency: int, warm_up: float, seconds: float) -> Load:
    cpu, result = time.process_time(), Load(seconds)
    begin = time.perf_counter() + warm_up
    end, requests, result.began = begin + seconds, cycle(_requests), begin

    async def client() -> None:
        connection = None
        while (sent := time.perf_counter()) < end:
            connection = await _send(port, connection, next(requests), sent, result, (begin, end))
            if connection is None:
                await asyncio.sleep(_PAUSE_S)
        if connection:
            connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    result.cpu_seconds = time.process_time() - cpu
    return result


async def _open(port: int, rate: float, warm_up: float, seconds: float, seed: int) -> Load:
    cpu, result = time.process_time(), Load(seconds)
    start = time.perf_counter()
    begin, requests, idle = start + warm_up, cycle(_requests), list[Connection]()
    result.began = begin

    async def send_one(due: float, data: bytes) -> None:
        counted = (due, float("inf")) if due >= begin else (0.0, 0.0)
        connection = await _send(port, idle.pop() if idle else None, data, due, result, counted)
        if connection:
            idle.append(connection)

    async with asyncio.TaskGroup() as tasks:
        for arrival in _arrivals(rate, warm_up + seconds, seed):
            await asyncio.sleep(start + arrival - time.perf_counter())
            tasks.create_task(send_one(start + arrival, next(requests)))
    for connection in idle:
        connection.close()
    result.cpu_seconds = time.process_time() - cpu
    return result


def _arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    rng = random.Random(seed)  # noqa: S311
    return takewhile(lambda at: at < seconds, accumulate(rng.expovariate(rate) for _ in count()))


async def _send(
    port: int,
    connection: Connection | None,
    data: bytes,
    since: float,
    result: Load,
    counted: tuple[float, float],
) -> Connection | None:
    """Send one request, count its answer if it arrives within `counted`; return the connection if usable."""
    answer = None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            connection = connection or await _connect(port)
            answer = await connection.post(data)
    except (OSError, TimeoutError, httptools.HttpParserError):
        if connection:
            connection.close()
    now = time.perf_counter()
    is_success = answer is not None and answer.status == 200
    result.answers += is_success
    if counted[0] <= now < counted[1]:
        if answer and is_success:
            result.latencies.append(now - since)
            result.moments.append(now - result.began)
            result.batches += [answer.batch] if answer.batch else []
        else:
            result.errors += 1
            if answer and answer.has_retry_after:
                result.refusals.append(now - result.began)
    return connection if connection and connection.alive else None


async def _connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, _host, port, ssl=_tls)
    return connection


class Connection(asyncio.Protocol):
    """Keep-alive connection with one request at a time; also the callbacks of its parser."""

    _transport: asyncio.Transport
    _answer: asyncio.Future[Answer] | None = None

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.alive = True

    def post(self, data: bytes) -> asyncio.Future[Answer]:
        """Send a request; return the future of its answer."""
        self._batch, self._body, self._has_retry_after = 0, b"", False
        self._answer = asyncio.get_running_loop().create_future()
        if self.alive:
            self._transport.write(data)
        else:
            self._answer.set_exception(ConnectionResetError())
        return self._answer

    def write(self, data: bytes) -> None:
        """Send more of the request."""
        if self.alive:
            self._transport.write(data)

    def close(self) -> None:
        self.alive = False
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self._fail(exc or ConnectionResetError())

    def _fail(self, error: Exception) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == BATCH_HEADER.lower().encode():
            self._batch = int(value)
        elif name.lower() == b"retry-after":
            self._has_retry_after = True

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result(
                Answer(self._parser.get_status_code(), self._batch, self._body, self._has_retry_after)
            )
        if not self._parser.should_keep_alive():
            self.close()
