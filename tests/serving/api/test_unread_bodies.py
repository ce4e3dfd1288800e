"""A refusal reaches the client: a small body that it still sends is read before the connection closes."""

from __future__ import annotations

import asyncio

import pytest

from serving.api import middleware
from serving.api.middleware import RequestMiddleware
from serving.http.problems import Refusal

PIECES = [
    {"type": "http.request", "body": b"half", "more_body": True},
    {"type": "http.request", "body": b"rest", "more_body": False},
]


async def refuse(scope, receive, send):
    raise Refusal(415, "unsupported_format", "no file")


def answer(headers: dict[bytes, bytes], pieces: list[dict]) -> tuple[bool, list[dict]]:
    """Whether the connection closes after the refusal, and the pieces of the body that were not read."""
    left, sent = list(pieces), []

    async def receive():
        if not left:
            await asyncio.sleep(60)
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/grade", "headers": list(headers.items())}
    asyncio.run(RequestMiddleware(refuse)(scope, receive, send))
    start, body = sent
    assert start["status"] == 415 and b"no file" in body["body"]
    return (b"connection", b"close") in start["headers"], left


def test_a_small_body_is_read_and_the_connection_stays():
    assert answer({b"content-length": b"8"}, PIECES) == (False, [])


@pytest.mark.parametrize(
    "headers",
    [{b"content-length": b"100000"}, {b"transfer-encoding": b"chunked"},
     {b"content-length": b"8", b"expect": b"100-continue"}],
    ids=["large", "unknown length", "waits for 100 Continue"],
)  # fmt: skip
def test_another_body_is_not_waited_for(headers):
    assert answer(headers, PIECES) == (True, PIECES)


def test_a_small_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(middleware, "_SMALL_SECONDS", 0.01)
    assert answer({b"content-length": b"8"}, PIECES[:1]) == (True, [])


def test_a_client_that_is_gone_is_not_waited_for():
    assert answer({b"content-length": b"8"}, [{"type": "http.disconnect"}]) == (True, [])
