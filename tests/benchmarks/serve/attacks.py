"""Attacks of a hostile client, in a separate process and from a separate address.

`setup` makes the requests. An attack runs for some seconds and returns the number of requests by status code.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import httptools
from PIL import Image

from jobs.bench.load import Answer, Connection, request

ADDRESS = "127.0.0.2"
"""Source address of the attacks, which limits by address distinguish from other clients."""

_BATCH_PATH = "/v1/grade/batch"
_HUGE, _LARGE = (7000, 7000), (4032, 3024)
_MEMBERS = 40  # of a zip
_BATCH = 100  # images
_TIMEOUT_S = 30.0
_PAUSE_S = 0.01  # of each client after an answer, as on another machine
_SLOW_PIECE, _SLOW_PAUSE_S = bytes(2048), 0.4  # 5 KiB/s, just above the lowest accepted rate


@dataclass(frozen=True)
class _Requests:
    huge: bytes
    large: bytes
    zipped: bytes
    batch: bytes
    image: bytes
    wrong_key: bytes
    probe: bytes
    slow_head: bytes


_port: int
_requests: _Requests


def setup(port: int, key: str, files: list[bytes]) -> None:
    """Make the requests once; lower the priority of this process, as if it were on another machine.

    Args:
        port: Port of the server.
        key: Key of the hostile client.
        files: Ordinary images.
    """
    global _port, _requests
    os.nice(19)
    _port = port
    huge, large = _png(_HUGE), _png(_LARGE)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(_MEMBERS):
            archive.writestr(f"{number}.png", (huge, large)[number % 2])
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    many = b"".join(part + files[number % len(files)] + b"\r\n" for number in range(_BATCH)) + b"--x--\r\n"
    _requests = _Requests(
        huge=request(huge, key),
        large=request(large, key),
        zipped=_post(_BATCH_PATH, key, "application/zip", buffer.getvalue()),
        batch=_post(_BATCH_PATH, key, "multipart/form-data; boundary=x", many),
        image=request(files[0], key),
        wrong_key=request(files[0], "wrong" * 8),
        probe=b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        slow_head=_post("/v1/grade", key, "multipart/form-data; boundary=x", part + bytes(10**6))[: -(10**6)],
    )


def large_images(seconds: float) -> Counter[str]:
    """PNG files of 49 and 12 megapixels, one per request."""
    return _run(seconds, 8, lambda number: _requests.large if number % 2 else _requests.huge)


def zip_batches(seconds: float) -> Counter[str]:
    """Zip archives of such PNG files."""
    return _run(seconds, 8, lambda _: _requests.zipped)


def many_batches(seconds: float) -> Counter[str]:
    """Batches of 100 ordinary images each."""
    return _run(seconds, 16, lambda _: _requests.batch)


def many_grades(seconds: float) -> Counter[str]:
    """Ordinary requests, as many as possible."""
    return _run(seconds, 32, lambda _: _requests.image)


def wrong_keys(seconds: float) -> Counter[str]:
    """Requests with a wrong key."""
    return _run(seconds, 16, lambda _: _requests.wrong_key)


def probes(seconds: float) -> Counter[str]:
    """GET /readyz without a key."""
    return _run(seconds, 32, lambda _: _requests.probe)


def slow_bodies(seconds: float) -> Counter[str]:
    """Bodies sent just fast enough not to be refused."""

    async def client(_number: int, ends: Counter[str], _until: float) -> None:
        connection = await _connect()
        answer = connection.post(_requests.slow_head)
        while not answer.done():
            connection.write(_SLOW_PIECE)
            await asyncio.wait([answer], timeout=_SLOW_PAUSE_S)
        ends[_code(answer.result())] += 1
        connection.close()
        await asyncio.sleep(1)  # immediate retries are another attack

    return asyncio.run(_run_clients(seconds, 400, client))


def idle_connections(seconds: float) -> Counter[str]:
    """Idle connections, opened again when they are closed."""

    async def client(_number: int, ends: Counter[str], _until: float) -> None:
        connection = await _connect()
        while connection.alive:
            await asyncio.sleep(0.2)
        ends["closed"] += 1

    return asyncio.run(_run_clients(seconds, 1000, client))


ATTACKS: dict[str, Callable[[float], Counter[str]]] = {
    "large PNG files in /v1/grade": large_images,
    "zip batches of large PNG files": zip_batches,
    "many batches": many_batches,
    "many grade requests": many_grades,
    "wrong keys": wrong_keys,
    "probes of /readyz": probes,
    "slow bodies": slow_bodies,
    "idle connections": idle_connections,
}


def _run(seconds: float, clients: int, choose: Callable[[int], bytes]) -> Counter[str]:
    """Run clients that send the next request after each answer."""

    async def client(number: int, ends: Counter[str], until: float) -> None:
        connection = await _connect()
        while connection.alive and time.monotonic() < until:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await connection.post(choose(number))
            ends[_code(answer)] += 1
            number += 1
            await asyncio.sleep(_PAUSE_S)
        connection.close()

    return asyncio.run(_run_clients(seconds, clients, client))


async def _run_clients(
    seconds: float, count: int, client: Callable[[int, Counter[str], float], Awaitable[None]]
) -> Counter[str]:
    """Run clients for some seconds; restart each that ends."""
    ends: Counter[str] = Counter()
    until = time.monotonic() + seconds

    async def repeat(number: int) -> None:
        while time.monotonic() < until:
            try:
                await client(number, ends, until)
            except (OSError, TimeoutError, httptools.HttpParserError):
                ends["connection lost"] += 1
                await asyncio.sleep(0.1)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(repeat(number))
    return ends


async def _connect() -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", _port, local_addr=(ADDRESS, 0))
    return connection


def _code(answer: Answer) -> str:
    if answer.status == 200:
        lines = answer.body.rstrip().rsplit(b"\n", 1)
        with suppress(ValueError):
            if json.loads(lines[-1]).get("status") == "aborted":
                return f"200 aborted {json.loads(lines[-1])['error_code']}"
        return "200"
    try:
        return f"{answer.status} {json.loads(answer.body)['code']}"
    except (ValueError, KeyError, TypeError):
        return str(answer.status)


def _post(path: str, key: str, content_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
