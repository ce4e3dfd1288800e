"""Timeouts and limits of connections to a real uvicorn server, as in Ray Serve, without Ray."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import pytest
import uvicorn

from serving.http.connections import Connection, HeaderFilterMiddleware

SECONDS = 0.4
LATE = 5.0

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


@pytest.fixture(scope="module")
def port():
    config = uvicorn.Config(
        HeaderFilterMiddleware(application), port=0, http=Quick, lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(LATE)


class Client:
    """A connection and its response."""

    def __init__(self, port: int) -> None:
        self.began = time.monotonic()  # before the other side's clock
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.got = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until_closed(self, drip: bytes = b"") -> float:
        """Seconds until the other side closed."""
        self.socket.settimeout(0.05)
        while time.monotonic() - self.began < LATE:
            try:
                piece = self.socket.recv(2**20)
                if not piece:
                    break
                self.got += piece
            except TimeoutError:
                self.socket.sendall(drip)
            except ConnectionError:
                break
        self.socket.close()
        return time.monotonic() - self.began

    def read_answer(self) -> dict:
        self.socket.settimeout(LATE)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            answer += self.socket.recv(65536)
        return json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_half_a_head_is_answered_and_closed(port, drip):
    client = Client(port)
    client.send(GET[:-2])
    assert SECONDS <= client.read_until_closed(drip) < LATE
    assert client.got.startswith(b"HTTP/1.1 408 ") and b'"code": "slow_head"' in client.got


def test_a_connection_without_a_byte_is_closed_without_a_word(port):
    client = Client(port)
    assert SECONDS <= client.read_until_closed() < LATE
    assert client.got == b""


def test_a_connection_that_is_kept_alive_waits_for_the_next_head_and_not_for_half_of_it(port):
    client = Client(port)
    for _ in range(3):
        client.send(GET)
        assert client.read_answer()["host"] == "x"
        time.sleep(SECONDS * 0.7)
    assert time.monotonic() - client.began > SECONDS  # longer than any single head may take
    client.send(GET[:-2])
    client.read_until_closed()
    assert b"slow_head" in client.got


def test_a_head_without_end_is_refused_by_its_size(port):
    client = Client(port)
    client.send(GET[:-2] + b"X-A: " + b"a" * 70_000)
    assert client.read_until_closed() < SECONDS
    assert client.got.startswith(b"HTTP/1.1 431 ") and b'"code": "large_head"' in client.got


def test_chunk_heads_without_end_are_refused_by_their_size(port):
    client = Client(port)
    client.send(b"POST /whole HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    time.sleep(0.1)
    client.send(b"1;" + b"a" * 70_000)
    client.read_until_closed()
    assert client.got.startswith(b"HTTP/1.1 431 ")


def test_a_body_is_left_to_the_application(port):
    client = Client(port)
    client.send(b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
    for _ in range(8):
        time.sleep(SECONDS / 4)
        client.send(b"a")
    assert client.read_answer()["size"] == 8


def test_what_is_sent_after_the_answer_keeps_no_connection(port):
    client = Client(port)
    client.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert client.read_answer()["size"] == 0
    assert SECONDS / 2 < client.read_until_closed(b"a") < LATE


def test_a_body_that_ends_after_the_answer_leaves_a_connection_to_use(port):
    client = Client(port)
    client.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
    client.read_answer()
    client.send(b"body" + GET)
    assert client.read_answer()["host"] == "x"


def test_requests_in_a_row_without_waiting_are_answered_in_their_order(port):
    client = Client(port)
    post = b"POST /whole HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab"
    client.send(GET + post + GET[:-4] + b"\r\nConnection: close\r\n\r\n")
    client.read_until_closed()
    assert [client.got.count(text) for text in (b"HTTP/1.1 200", b'"size": 0', b'"size": 2')] == [3, 2, 1]


def test_an_answer_that_is_not_taken_in_is_not_kept(port):
    client = Client(port)
    client.send(GET.replace(b"/whole", b"/large"))
    time.sleep(3 * SECONDS)
    client.read_until_closed()
    assert len(client.got) < 64 * 2**20


@pytest.mark.parametrize(
    "head", [b"NONSENSE\r\n\r\n", GET.replace(b"1.1", b"9.9"), b"\x16\x03\x01\x02\x00\x01"]
)
def test_what_is_no_http_is_a_problem(port, head):
    client = Client(port)
    client.send(head)
    client.read_until_closed()
    assert client.got.startswith(b"HTTP/1.1 400 ") and b'"code": "bad_request"' in client.got
    assert b"content-type: application/problem+json" in client.got


def test_ids_are_made_good_and_rays_steering_is_taken_out(port):
    client = Client(port)
    bad = b"X-Request-ID: \xff\xfe\r\nX-Request-Timeout-Seconds: 0\r\nX-Request-Disconnect-Disabled: ?1\r\n"
    client.send(GET[:-2] + bad + b"\r\n")
    answer = client.read_answer()
    assert len(answer["x-request-id"]) == 36
    assert not any("timeout" in name or "disconnect" in name for name in answer)
    client.send(GET[:-2] + b"X-Request-ID: visit-7\r\n\r\n")
    assert client.read_answer()["x-request-id"] == "visit-7"
