"""The load generator: photographs over keep-alive connections, from one process of little CPU.

`setup` makes the requests in a process of its own (`measure.OwnProcess`), the rest runs in it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count, cycle, takewhile
from typing import Any

import httptools

PATH = "/v1/grade"
BATCH_HEADER = "X-Batch-Size"

_BOUNDARY = "photograph-0d5e1f6c"
_TIMEOUT_S = 30.0
# After a lost connection; a server that is away must not be asked a thousand times a second.
_PAUSE_S = 0.05


@dataclass
class Load:
    """What a turn of load came to.

    Args:
        seconds: that were counted.
        latencies: seconds of each good answer that came in them; from the scheduled arrival in an open loop.
        batches: `X-Batch-Size` of these: photographs in the forward pass that graded it.
        moments: seconds after the first that counts at which each of these came.
        errors: requests without a good answer in them: refused, lost or late.
        refusals: moments of those of them that were told when to come again.
        answers: good ones in all, with those of the warm-up: what the servers' CPU was spent on.
        cpu_seconds: of this process in all.
        began: when the first second that counts did, by `time.perf_counter`.
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


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    batch: int
    body: bytes
    told_when: bool  # to come again


_requests: list[bytes]


def setup(files: list[bytes], key: str | None = None) -> None:
    """Makes the requests of these photographs, once."""
    global _requests
    _requests = [request(data, key) for data in files]


def request(data: bytes, key: str | None = None) -> bytes:
    """A whole HTTP/1.1 request that posts one photograph as a form."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()
    start = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    start += f"Authorization: Bearer {key}\r\n" if key else ""
    return f"{start}Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n\r\n".encode() + body


def closed(port: int, concurrency: int, warm_up: float, seconds: float) -> Load:
    """So many clients, each of which asks again as soon as it is answered.

    Args:
        port: of the server, on loopback.
        concurrency: clients.
        warm_up: seconds before those that count.
        seconds: that count.
    """
    return asyncio.run(_closed(port, concurrency, warm_up, seconds))


def open_loop(port: int, rate: float, warm_up: float, seconds: float, seed: int = 0) -> Load:
    """Photographs that come at random (Poisson), whether or not those before them are answered.

    Latency counts from when a photograph was to come, so that a server that holds the clients up is not
    flattered by the requests they could not send meanwhile.

    Args:
        port: of the server, on loopback.
        rate: arrivals a second, on average.
        warm_up: seconds before those that count.
        seconds: that count.
        seed: of the arrivals: servers at the same rate get the same.
    """
    return asyncio.run(_open(port, rate, warm_up, seconds, seed))


def answers(port: int) -> list[dict[str, Any]]:
    """What the server says of every photograph, one after the other.

    Raises:
        RuntimeError: it refuses one.
    """
    return asyncio.run(_answers(port))


async def _answers(port: int) -> list[dict[str, Any]]:
    connection, found = await _connect(port), []
    for each in _requests:
        if not connection.alive:  # a server may close one that is idle, or when it changes what it is made of
            connection = await _connect(port)
        answer = await connection.post(each)
        if answer.status != 200:
            raise RuntimeError(f"port {port} answers {answer.status}: {answer.body.decode()[:500]}")
        found.append(json.loads(answer.body))
    connection.close()
    return found


async def _closed(port: int, concurrency: int, warm_up: float, seconds: float) -> Load:
    cpu, found = time.process_time(), Load(seconds)
    begin = time.perf_counter() + warm_up
    end, photographs, found.began = begin + seconds, cycle(_requests), begin

    async def client() -> None:
        connection = None
        while (sent := time.perf_counter()) < end:
            connection = await _ask(port, connection, next(photographs), sent, found, (begin, end))
            if connection is None:
                await asyncio.sleep(_PAUSE_S)
        if connection:
            connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    found.cpu_seconds = time.process_time() - cpu
    return found


async def _open(port: int, rate: float, warm_up: float, seconds: float, seed: int) -> Load:
    cpu, found = time.process_time(), Load(seconds)
    start = time.perf_counter()
    begin, photographs, idle = start + warm_up, cycle(_requests), list[Connection]()
    found.began = begin

    async def one(due: float, photograph: bytes) -> None:
        counted = (due, float("inf")) if due >= begin else (0.0, 0.0)
        connection = await _ask(port, idle.pop() if idle else None, photograph, due, found, counted)
        if connection:
            idle.append(connection)

    async with asyncio.TaskGroup() as tasks:
        for arrival in _arrivals(rate, warm_up + seconds, seed):
            await asyncio.sleep(start + arrival - time.perf_counter())
            tasks.create_task(one(start + arrival, next(photographs)))
    for connection in idle:
        connection.close()
    found.cpu_seconds = time.process_time() - cpu
    return found


def _arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    draw = random.Random(seed)  # noqa: S311
    return takewhile(lambda at: at < seconds, accumulate(draw.expovariate(rate) for _ in count()))


async def _ask(
    port: int,
    connection: Connection | None,
    photograph: bytes,
    since: float,
    found: Load,
    counted: tuple[float, float],
) -> Connection | None:
    """Posts one photograph, counts its answer if it comes between two times; the connection if it lives."""
    answer = None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            connection = connection or await _connect(port)
            answer = await connection.post(photograph)
    except (OSError, TimeoutError, httptools.HttpParserError):
        if connection:
            connection.close()
    now = time.perf_counter()
    good = answer is not None and answer.status == 200
    found.answers += good
    if counted[0] <= now < counted[1]:
        if answer and good:
            found.latencies.append(now - since)
            found.moments.append(now - found.began)
            found.batches += [answer.batch] if answer.batch else []
        else:
            found.errors += 1
            if answer and answer.told_when:
                found.refusals.append(now - found.began)
    return connection if connection and connection.alive else None


async def _connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Connection(asyncio.Protocol):
    """One keep-alive connection, with one request at a time; also what its parser calls back."""

    _transport: asyncio.Transport
    _answer: asyncio.Future[Answer] | None = None

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.alive = True

    def post(self, data: bytes) -> asyncio.Future[Answer]:
        """Sends a request; its answer is to come."""
        self._batch, self._body, self._told_when = 0, b"", False
        self._answer = asyncio.get_running_loop().create_future()
        if self.alive:
            self._transport.write(data)
        else:
            self._answer.set_exception(ConnectionResetError())
        return self._answer

    def write(self, data: bytes) -> None:
        """Sends more of the request."""
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
            self._told_when = True

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result(
                Answer(self._parser.get_status_code(), self._batch, self._body, self._told_when)
            )
        if not self._parser.should_keep_alive():
            self.close()
