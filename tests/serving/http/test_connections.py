"""Timeouts and limits of connections to a real uvicorn server, as in Ray Serve, without Ray."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from serving.http.connections import Connection, HeaderFilterMiddleware
from tests.support.virtual_time import ManualLoop

SECONDS = 4.0  # of the server's clock; less than uvicorn's own 5 s between requests
LATE = 60.0  # real time after which a test gives up

GET = b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n"


async def application(scope, receive, send):
    """`/whole` reads the body, `/early` does not, `/large` sends more than buffers hold."""
    size = 0
    if scope["path"] == "/whole":
        more = True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
    headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
    body = bytes(64 * 2**20) if scope["path"] == "/large" else json.dumps({"size": size, **headers}).encode()
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


class Quick(Connection):
    seconds = SECONDS


class Server(uvicorn.Server):
    """uvicorn in a thread, with a clock that stands still unless a test advances it."""

    def __init__(self) -> None:
        config = {"port": 0, "http": Quick, "lifespan": "off", "log_level": "critical"}
        super().__init__(uvicorn.Config(HeaderFilterMiddleware(application), **config))
        self.loop = ManualLoop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.serve(),))
        self.thread.start()
        wait_for(lambda: self.started)
        self.port = self.servers[0].sockets[0].getsockname()[1]

    def close(self) -> None:
        self.should_exit = True
        while self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.advance, 1.0)
            self.thread.join(0.05)
        self.loop.close()

    def run_in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LATE)

    def advance(self, seconds: float) -> None:
        self.run_in_loop(self._advance(seconds))

    def is_writing_paused(self) -> bool:
        return self.run_in_loop(self._is_writing_paused())

    async def _is_writing_paused(self) -> bool:
        return any(each.flow.write_paused for each in self.server_state.connections)

    async def _advance(self, seconds: float) -> None:
        self.loop.advance(seconds)
        for _ in range(3):  # what is due runs meanwhile
            await asyncio.sleep(0)


def wait_for(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + LATE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


class Client:
    """A connection and its response."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.got = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until_closed(self, drip: bytes = b"", step: float = SECONDS / 8) -> float:
        """Seconds of the server's clock until it closes; advances it in steps, and sends `drip` at each."""
        self.socket.settimeout(0.05)
        seconds, give_up = 0.0, time.monotonic() + LATE
        while True:
            assert time.monotonic() < give_up
            try:
                piece = self.socket.recv(2**20)
                if not piece:
                    break
                self.got += piece
            except TimeoutError:
                self.server.advance(step)
                seconds += step
                with suppress(ConnectionError):
                    self.socket.sendall(drip)
            except ConnectionError:
                break
        self.socket.close()
        return seconds

    def read_answer(self) -> dict:
        self.socket.settimeout(LATE)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            answer += self.socket.recv(65536)
        return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_half_a_head_is_answered_and_closed(server, drip):
    client = Client(server)
    client.send(GET[:-2])
    assert client.read_until_closed(drip) >= SECONDS
    assert client.got.startswith(b"HTTP/1.1 408 ") and b'"code": "slow_head"' in client.got


def test_a_connection_without_a_byte_is_closed_without_a_word(server):
    client = Client(server)
    assert client.read_until_closed() >= SECONDS
    assert client.got == b""


def test_a_connection_that_is_kept_alive_waits_for_the_next_head_and_not_for_half_of_it(server):
    client = Client(server)
    for _ in range(3):  # longer in all than any single head may take
        client.send(GET)
        assert client.read_answer()["host"] == "x"
        server.advance(SECONDS * 0.7)
    client.send(GET[:-2])
    client.read_until_closed()
    assert b"slow_head" in client.got


def test_a_head_without_end_is_refused_by_its_size(server):
    client = Client(server)
    client.send(GET[:-2] + b"X-A: " + b"a" * 70_000)
    client.read_until_closed(step=0)
    assert client.got.startswith(b"HTTP/1.1 431 ") and b'"code": "large_head"' in client.got


def test_chunk_heads_without_end_are_refused_by_their_size(server):
    client = Client(server)
    client.send(b"POST /whole HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    time.sleep(0.1)
    client.send(b"1;" + b"a" * 70_000)
    client.read_until_closed(step=0)
    assert client.got.startswith(b"HTTP/1.1 431 ")


def test_a_body_is_left_to_the_application(server):
    client = Client(server)
    client.send(b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
    for _ in range(8):
        server.advance(SECONDS / 4)
        client.send(b"a")
    assert client.read_answer()["size"] == 8


def test_what_is_sent_after_the_answer_keeps_no_connection(server):
    client = Client(server)
    client.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert client.read_answer()["size"] == 0
    assert client.read_until_closed(b"a") > SECONDS / 2


def test_a_body_that_ends_after_the_answer_leaves_a_connection_to_use(server):
    client = Client(server)
    client.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
    client.read_answer()
    client.send(b"body" + GET)
    assert client.read_answer()["host"] == "x"


def test_requests_in_a_row_without_waiting_are_answered_in_their_order(server):
    client = Client(server)
    post = b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab"
    client.send(GET + post + GET[:-4] + b"\r\nConnection: close\r\n\r\n")
    client.read_until_closed()
    assert [client.got.count(text) for text in (b"HTTP/1.1 200", b'"size": 0', b'"size": 2')] == [3, 2, 1]


def test_an_answer_that_is_not_taken_in_is_not_kept(server):
    client = Client(server)
    client.send(GET.replace(b"/whole", b"/large"))
    wait_for(server.is_writing_paused)
    server.advance(SECONDS)
    client.read_until_closed(step=0)
    assert len(client.got) < 64 * 2**20


@pytest.mark.parametrize(
    "head", [b"NONSENSE\r\n\r\n", GET.replace(b"1.1", b"9.9"), b"\x16\x03\x01\x02\x00\x01"]
)
def test_what_is_no_http_is_a_problem(server, head):
    client = Client(server)
    client.send(head)
    client.read_until_closed()
    assert client.got.startswith(b"HTTP/1.1 400 ") and b'"code": "bad_request"' in client.got
    assert b"content-type: application/problem+json" in client.got


def test_ids_are_made_good_and_rays_steering_is_taken_out(server):
    client = Client(server)
    bad = b"X-Request-ID: \xff\xfe\r\nX-Request-Timeout-Seconds: 0\r\nX-Request-Disconnect-Disabled: ?1\r\n"
    client.send(GET[:-2] + bad + b"\r\n")
    answer = client.read_answer()
    assert len(answer["x-request-id"]) == 36
    assert not any("timeout" in name or "disconnect" in name for name in answer)
    client.send(GET[:-2] + b"X-Request-ID: visit-7\r\n\r\n")
    assert client.read_answer()["x-request-id"] == "visit-7"
