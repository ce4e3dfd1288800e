"""The bench compares servers that do the same work under the same load; how fast they are here is no test."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from jobs.bench.serve import load
from jobs.bench.serve.comparison import CLOSED, ratios

FILES = [b"photograph %d" % index for index in range(3)]


@contextmanager
def answering(answer, seconds=0.0):
    """A server on loopback that gives every request the bytes of `answer`; its port and what it was sent."""
    started, asked, stopped = threading.Event(), [], None
    port = 0

    async def each(reader, writer):
        with_errors = (asyncio.IncompleteReadError, ConnectionError)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                asked.append(await reader.readexactly(length))
                await asyncio.sleep(seconds)
                writer.write(answer)
                if not answer:
                    writer.close()
                    return
        except with_errors:
            writer.close()

    async def serve_until_stopped():
        nonlocal port, stopped
        stopped = asyncio.Event()
        server = await asyncio.start_server(each, "127.0.0.1", 0, limit=2**20)
        port = server.sockets[0].getsockname()[1]
        started.set()
        await stopped.wait()
        server.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve_until_stopped(),))
    thread.start()
    started.wait()
    try:
        yield port, asked
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()


def reply(status, body, **headers):
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode()


@pytest.fixture(autouse=True)
def photographs():
    load.setup(FILES)


def test_closed_loop_counts_what_comes_in_its_seconds():
    with answering(reply(200, "{}", X_Batch_Size=4), seconds=0.02) as (port, asked):
        found = load.closed(port, 2, warm_up=0.2, seconds=0.5)
    assert len(found.latencies) == pytest.approx(50, rel=0.3)  # two clients, 50 a second each
    assert found.answers == len(asked) > len(found.latencies)
    assert min(found.latencies) >= 0.02
    assert (set(found.batches), found.errors) == ({4}, 0)
    assert all(any(file in body for body in asked) for file in FILES)


def test_open_loop_asks_on_whether_or_not_it_is_answered():
    with answering(reply(200, "{}"), seconds=0.3) as (port, asked):
        found = load.open_loop(port, rate=20, warm_up=0, seconds=1)
    assert len(found.latencies) == len(asked) == pytest.approx(20, abs=12)
    assert min(found.latencies) >= 0.3
    again = list(load._arrivals(20, 1, seed=0))
    assert len(again) == len(asked)  # all servers get the same arrivals


def test_a_stall_of_the_client_is_counted_from_when_a_photograph_was_due(monkeypatch):
    connect = load._connect

    async def late(port):
        time.sleep(0.3)  # the whole loop stands still
        return await connect(port)

    monkeypatch.setattr(load, "_connect", late)
    with answering(reply(200, "{}")) as (port, _):
        found = load.open_loop(port, rate=30, warm_up=0, seconds=0.5)
    assert sorted(found.latencies)[len(found.latencies) // 2] > 0.3


@pytest.mark.parametrize(
    "answer", [reply(503, "busy"), b"", b"no http\r\n\r\n"], ids=["refused", "lost", "odd"]
)
def test_errors_are_counted_and_no_answers(answer):
    with answering(answer) as (port, _):
        found = load.closed(port, 1, warm_up=0, seconds=0.3)
        with pytest.raises((RuntimeError, OSError, load.httptools.HttpParserError)):
            load.answers(port)
    assert found.errors > 0
    assert (found.latencies, found.answers) == ([], 0)


def test_a_server_that_is_away_is_not_asked_without_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = load.closed(port, 1, warm_up=0, seconds=0.5)
    assert 1 <= found.errors <= 12


def row(what, clients, rate, p50):
    return {"what": what, "load": CLOSED, "clients": clients, "requests_per_second": rate, "p50_ms": p50}


def test_ratios_are_against_the_best_of_the_others():
    rows = [
        *(row("scalp serve", clients, 60, 20) for clients in (1, 8, 16)),
        *(row("LitServe, PyTorch, 1 worker", clients, 40, 40) for clients in (1, 8, 16)),
        *(row("LitServe, PyTorch, 2 workers", clients, 50, 50) for clients in (1, 8, 16)),
        row("FastAPI, PyTorch", 8, 30, 99),
        {"what": "scalp serve", "load": "idle", "cores": 0.1},
        {"what": "a grader killed", "load": "", "failed": 0, "failed_without_retries": 9},
    ]
    found = ratios(rows)
    assert found["rps_vs_litserve_c8"] == found["rps_vs_litserve_c16"] == pytest.approx(1.2)
    assert found["p50_vs_litserve_c1"] == pytest.approx(0.5)
    assert found["rps_vs_fastapi_c8"] == pytest.approx(2)
    assert (found["failed_under_fault"], found["failed_without_retries"]) == (0, 9)
    assert found["rps_vs_litserve_with_our_engine_c8"] is None  # it was not run
