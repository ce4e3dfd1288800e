"""The load generator counts answers and errors as they come; `scalp bench serve` writes them as JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from jobs.bench import inputs, load
from jobs.bench.serve import bench_serve
from scalp_core.errors import UserError
from tests.support.images import jpeg

FILES = [b"photograph %d" % index for index in range(3)]


@contextmanager
def answering(answer, seconds=0.0, key=None):
    """A server on loopback that gives every request the bytes of `answer`; its port and what it was sent."""
    started, asked, stopped = threading.Event(), [], None
    port = 0

    async def each(reader, writer):
        with_errors = (asyncio.IncompleteReadError, ConnectionError)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                assert not key or f"authorization: bearer {key}\r\n".encode() in head.lower()
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


def at(port):
    return f"http://127.0.0.1:{port}"


def reply(status, body, **headers):
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", body]).encode()


@pytest.fixture(autouse=True)
def photographs():
    load.setup(FILES)


@pytest.mark.medium
def test_closed_loop_counts_what_comes_in_its_seconds():
    with answering(reply(200, "{}", X_Batch_Size=4), seconds=0.02) as (port, asked):
        found = load.closed(at(port), 2, warm_up=0.2, seconds=0.5)
    # Two clients with at most 50 per second each: of 0.5 s; and of the warm-up, with those that end later.
    assert 0 < len(found.latencies) <= 52
    assert len(asked) - len(found.latencies) <= 24
    assert found.answers == len(asked) > len(found.latencies)
    assert min(found.latencies) >= 0.02
    assert (set(found.batches), found.errors) == ({4}, 0)
    assert all(any(file in body for body in asked) for file in FILES)


@pytest.mark.medium
def test_open_loop_asks_on_whether_or_not_it_is_answered():
    with answering(reply(200, "{}"), seconds=0.15) as (port, asked):
        found = load.open_loop(at(port), rate=40, warm_up=0, seconds=0.5)
    assert len(found.latencies) == len(asked) == pytest.approx(20, abs=12)
    assert min(found.latencies) >= 0.15
    again = list(load._arrivals(40, 0.5, seed=0))
    assert len(again) == len(asked)  # all servers get the same arrivals


@pytest.mark.medium
def test_a_stall_of_the_client_is_counted_from_when_a_photograph_was_due(monkeypatch):
    send = load._send

    def late(*arguments):
        time.sleep(0.05)  # the whole loop stands still
        return send(*arguments)

    monkeypatch.setattr(load, "_send", late)
    with answering(reply(200, "{}")) as (port, _):
        found = load.open_loop(at(port), rate=60, warm_up=0, seconds=0.25)
    assert sorted(found.latencies)[len(found.latencies) // 2] > 0.15


@pytest.mark.medium
@pytest.mark.parametrize(
    "answer", [reply(503, "busy"), b"", b"no http\r\n\r\n"], ids=["refused", "lost", "odd"]
)
def test_errors_are_counted_and_no_answers(answer):
    with answering(answer) as (port, _):
        found = load.closed(at(port), 1, warm_up=0, seconds=0.3)
        with pytest.raises((RuntimeError, OSError, load.aiohttp.ClientError)):
            load.answers(at(port))
    assert found.errors > 0
    assert (found.latencies, found.answers) == ([], 0)


@pytest.mark.medium
def test_a_server_that_is_away_is_not_asked_without_end():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = load.closed(at(port), 1, warm_up=0, seconds=0.5)
    assert 1 <= found.errors <= 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(inputs.MIN_IMAGES):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return str(folder)


@pytest.mark.medium
@pytest.mark.parametrize("rate", [None, 40.0], ids=["closed", "open"])
def test_an_endpoint_is_loaded_with_a_key(tmp_path, folder, rate):
    key = "a-key-of-the-clinic"
    with answering(reply(200, "{}", X_Batch_Size=2), seconds=0.02, key=key) as (port, asked):
        url = f"http://localhost:{port}/"
        bench_serve(str(tmp_path), url, folder, clients=2, rate=rate, seconds=1, key=key)
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text)
    (row,) = summary["rows"]
    assert (summary["kind"], summary["settings"]["rate"]) == ("serve-url", rate)
    assert 0 < row["requests_per_second"] < len(asked)  # one second, after another of warm-up
    assert row["p99_ms"] >= row["p50_ms"] >= 20
    assert (row["errors"], row["batch_fill"]) == (0, 2)
    assert summary["command"] and key not in text


def test_an_endpoint_that_refuses_the_first_image_is_not_loaded(tmp_path, folder):
    refused = pytest.raises(UserError, match="answers 401 to the first image: unauthorized")
    with answering(reply(401, "unauthorized")) as (port, asked), refused:
        bench_serve(str(tmp_path), at(port), folder)
    assert len(asked) == 1
    with pytest.raises(UserError, match=f"127.0.0.1:{port} is unreachable"):
        bench_serve(str(tmp_path), at(port), folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://clinic", "http://", "http://a:b@clinic", "http://a:x"]
)
def test_a_url_that_cannot_be_loaded_is_refused(tmp_path, url):
    with pytest.raises(UserError, match="--url"):
        bench_serve(str(tmp_path), url)
