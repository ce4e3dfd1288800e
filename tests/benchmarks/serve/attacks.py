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
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from PIL import Image

from jobs.bench import load

ADDRESS = "127.0.0.2"
"""Source address of the attacks, which limits by address distinguish from other clients."""

_BATCH_PATH = "/v1/grade/batch"
_HUGE, _LARGE = (7000, 7000), (4032, 3024)
_MEMBERS = 40  # of a zip
_BATCH = 100  # images
_TIMEOUT_S = 30.0
_PAUSE_S = 0.01  # of each client after an answer, as on another machine
_ANSWER_BYTES = 2**16
_SLOW_PIECE, _SLOW_PAUSE_S = bytes(2048), 0.4  # 5 KiB/s, just above the lowest accepted rate


class _Request(NamedTuple):
    """One request; without a body it is a GET."""

    path: str
    headers: dict[str, str]
    body: bytes | None = None


_url: str
_requests: dict[str, _Request]


def setup(url: str, key: str, files: list[bytes]) -> None:
    """Make the requests once; lower the priority of this process, as if it were on another machine.

    Args:
        url: Base URL of the server.
        key: Key of the hostile client.
        files: Ordinary images.
    """
    global _url, _requests
    os.nice(19)
    _url = url
    huge, large = _png(_HUGE), _png(_LARGE)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(_MEMBERS):
            archive.writestr(f"{number}.png", (huge, large)[number % 2])
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    many = b"".join(part + files[number % len(files)] + b"\r\n" for number in range(_BATCH)) + b"--x--\r\n"
    headers = load.headers(key)
    _requests = {
        "huge": _Request(load.PATH, headers, load.form(huge)),
        "large": _Request(load.PATH, headers, load.form(large)),
        "zipped": _Request(_BATCH_PATH, headers | {"Content-Type": "application/zip"}, buffer.getvalue()),
        "batch": _Request(_BATCH_PATH, headers | {"Content-Type": "multipart/form-data; boundary=x"}, many),
        "image": _Request(load.PATH, headers, load.form(files[0])),
        "wrong key": _Request(load.PATH, load.headers("wrong" * 8), load.form(files[0])),
        "probe": _Request("/readyz", {}),
    }


def large_images(seconds: float) -> Counter[str]:
    """PNG files of 49 and 12 megapixels, one per request."""
    return _run(seconds, 8, "huge", "large")


def zip_batches(seconds: float) -> Counter[str]:
    """Zip archives of such PNG files."""
    return _run(seconds, 8, "zipped")


def many_batches(seconds: float) -> Counter[str]:
    """Batches of 100 ordinary images each."""
    return _run(seconds, 16, "batch")


def many_grades(seconds: float) -> Counter[str]:
    """Ordinary requests, as many as possible."""
    return _run(seconds, 32, "image")


def wrong_keys(seconds: float) -> Counter[str]:
    """Requests with a wrong key."""
    return _run(seconds, 16, "wrong key")


def probes(seconds: float) -> Counter[str]:
    """GET /readyz without a key."""
    return _run(seconds, 32, "probe")


def slow_bodies(seconds: float) -> Counter[str]:
    """Bodies sent just fast enough not to be refused."""
    image = _requests["image"]
    lines = [f"{name}: {value}" for name, value in image.headers.items()]
    head = "\r\n".join([f"POST {image.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 1000000", *lines])

    async def client(_number: int, ends: Counter[str], _until: float) -> None:
        reader, writer = await _connect()
        writer.write(f"{head}\r\n\r\n".encode())
        answer = asyncio.create_task(reader.read(_ANSWER_BYTES))
        while not answer.done():
            writer.write(_SLOW_PIECE)
            await asyncio.wait([answer], timeout=_SLOW_PAUSE_S)
        status, _, body = answer.result().partition(b"\r\n\r\n")
        ends[_code(int(status.split()[1]), body) if status else "connection lost"] += 1
        writer.close()
        await asyncio.sleep(1)  # immediate retries are another attack

    return asyncio.run(_run_clients(seconds, 400, client))


def idle_connections(seconds: float) -> Counter[str]:
    """Idle connections, opened again when they are closed."""

    async def client(_number: int, ends: Counter[str], _until: float) -> None:
        reader, writer = await _connect()
        await reader.read()
        writer.close()
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


def _run(seconds: float, clients: int, *names: str) -> Counter[str]:
    """Run clients that send the next request after each answer, on a connection each."""

    async def client(number: int, ends: Counter[str], until: float) -> None:
        connector = aiohttp.TCPConnector(limit=1, local_addr=(ADDRESS, 0))
        timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while time.monotonic() < until:
                path, headers, body = _requests[names[number % len(names)]]
                method = "GET" if body is None else "POST"
                async with session.request(method, _url + path, headers=headers, data=body) as answer:
                    ends[_code(answer.status, await answer.read())] += 1
                number += 1
                await asyncio.sleep(_PAUSE_S)

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
            except (OSError, TimeoutError, aiohttp.ClientError):
                ends["connection lost"] += 1
                await asyncio.sleep(0.1)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(repeat(number))
    return ends


async def _connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    port = urlsplit(_url).port
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(ADDRESS, 0))


def _code(status: int, body: bytes) -> str:
    if status == 200:
        lines = body.rstrip().rsplit(b"\n", 1)
        with suppress(ValueError):
            if json.loads(lines[-1]).get("status") == "aborted":
                return f"200 aborted {json.loads(lines[-1])['error_code']}"
        return "200"
    try:
        return f"{status} {json.loads(body)['code']}"
    except (ValueError, KeyError, TypeError):
        return str(status)


def _png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
