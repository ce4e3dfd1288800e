"""Middleware of all requests, without Ray: the application is called like by a server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from scalp_core.images.codecs import MAX_BYTES
from serving.admission.limits import Limits, Load
from serving.api.middleware import install
from serving.auth.keys import KeySettings
from serving.http import problems
from serving.observability.audit import AuditLog
from serving.observability.audit_writer import AuditSettings
from serving.settings import Settings
from tests.support.virtual_time import run

KEY = "a-key-of-ann-that-is-long-enough"
BEARER = {"Authorization": f"Bearer {KEY}"}


def application(audit: AuditLog | None = None, **settings: Any) -> tuple[FastAPI, Load]:
    """Routes that read, wait and fail, on the paths with separate limits."""
    api, all_settings = FastAPI(), Settings(**settings)
    load = Load(all_settings.limits)
    install(api, all_settings, load, audit)
    problems.install(api)
    api.state.go_on = asyncio.Event()

    @api.post("/v1/grade")
    @api.post("/v1/grade/batch")
    @api.post("/v1/bulk/{name}")
    async def read(request: Request) -> int:
        return len(await request.body())

    @api.post("/v1/wait")
    async def wait(request: Request) -> int:
        await request.body()
        await api.state.go_on.wait()
        return 0

    @api.get("/v1/fails")
    async def fails() -> None:
        raise RuntimeError("secret detail")

    @api.post("/v1/breaks")
    async def breaks() -> StreamingResponse:
        async def half() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("secret detail")

        return StreamingResponse(half())

    @api.get("/")
    async def page() -> str:
        return "page"

    return api, load


def client(api: FastAPI, peer: str = "127.0.0.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(api, client=(peer, 1)), base_url="http://localhost"
    )


def ask(api: FastAPI, method: str, path: str, peer: str = "127.0.0.1", **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client(api, peer) as session:
            return await session.request(method, path, **options)

    return run(send())


def problem(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code and body["request_id"]
    assert response.headers["x-content-type-options"] == "nosniff"
    return response.status_code, body["code"]


async def trickle(*pieces: tuple[float, bytes]) -> AsyncIterator[bytes]:
    for seconds, piece in pieces:
        await asyncio.sleep(seconds)
        yield piece


def test_every_answer_has_safe_headers():
    api, _ = application()
    for method, path in [
        ("GET", "/"),
        ("POST", "/v1/grade"),
        ("GET", "/nothing"),
        ("PUT", "/"),
        ("GET", "/v1/fails"),
    ]:
        headers = ask(api, method, path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert (
            "camera=(self)" in headers["permissions-policy"]
            and "microphone=()" in headers["permissions-policy"]
        )
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        assert "strict-transport-security" not in headers


def test_browsers_are_told_to_insist_on_tls_when_there_is_tls():
    api, _ = application()
    assert "max-age" in ask(api, "GET", "https://test/").headers["strict-transport-security"]


@pytest.mark.parametrize("given", ["visit-7", "x" * 128])
def test_a_good_request_id_is_kept(given):
    api, _ = application()
    assert ask(api, "GET", "/nothing", headers={"X-Request-ID": given}).json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", b"\xff\xfe", b'a\x1b[31m"', b"a\tb"])
def test_a_bad_request_id_is_replaced(given):
    api, _ = application()
    made = ask(api, "GET", "/nothing", headers={"X-Request-ID": given}).json()["request_id"]
    assert len(made) == 36 and made.isascii()


def test_a_failure_shows_no_traceback():
    api, _ = application()
    response = ask(api, "GET", "/v1/fails")
    assert problem(response) == (500, "internal")
    assert "secret" not in response.text


def test_keys_close_what_they_are_for_and_nothing_else(monkeypatch):
    monkeypatch.setenv("SCALP_KEYS", f"ann: {KEY}")
    api, _ = application()
    assert ask(api, "POST", "/v1/grade", headers=BEARER).status_code == 200
    assert ask(api, "GET", "/").status_code == 200
    for headers, code in [({}, "no_key"), ({"Authorization": "Bearer wrong"}, "wrong_key")]:
        for method, path in [
            ("POST", "/v1/grade"),
            ("GET", "/v1/fails"),
            ("POST", "/v1/bulk/x"),
            ("GET", "/v1/nothing"),
        ]:
            response = ask(api, method, path, "8.8.8.8", headers=headers)
            assert problem(response) == (401, code)
            assert response.headers["www-authenticate"] == "Bearer"


def test_without_keys_the_network_is_not_answered_unless_told():
    api, _ = application()
    assert problem(ask(api, "POST", "/v1/grade", "8.8.8.8")) == (403, "not_open")
    assert ask(api, "GET", "/", "8.8.8.8").status_code == 200
    assert ask(api, "POST", "/v1/grade", "::1").status_code == 200
    api, _ = application(keys=KeySettings(open_to_network_without_keys=True))
    assert ask(api, "POST", "/v1/grade", "8.8.8.8").status_code == 200


def test_bodies_are_bounded_by_path():
    api, _ = application(limits=Limits(grade_bytes=1000, batch_bytes=3000, other_bytes=100))
    for path, limit in [("/v1/grade", 1000), ("/v1/grade/batch", 3000), ("/v1/bulk/x", 100)]:
        assert ask(api, "POST", path, content=bytes(limit)).json() == limit
        assert problem(ask(api, "POST", path, content=bytes(limit + 1))) == (413, "too_many_bytes")
        undeclared = trickle((0, bytes(limit)), (0, b"x"))
        assert problem(ask(api, "POST", path, content=undeclared)) == (413, "too_many_bytes")


def test_a_photograph_of_the_largest_size_fits():
    api, _ = application()
    assert ask(api, "POST", "/v1/grade", content=bytes(MAX_BYTES)).json() == MAX_BYTES


LIMITS = {"grace_seconds": 0.2, "min_bytes_per_s": 1000}


def test_a_body_that_stops_is_refused():
    api, load = application(limits=Limits(**LIMITS))
    for_ever = trickle((0, b"x"), (math.inf, b"y"))
    assert problem(ask(api, "POST", "/v1/grade", content=for_ever)) == (408, "slow_body")
    assert (load.uploads.total, load.in_flight.total, load.held_bytes.total) == (0, 0, 0)


def test_a_body_that_is_slower_than_the_rate_is_refused_and_one_that_is_not_passes():
    api, _ = application(limits=Limits(**LIMITS))
    slow = trickle(*[(0.05, b"x")] * 40)
    assert problem(ask(api, "POST", "/v1/grade", content=slow)) == (408, "slow_body")
    assert ask(api, "POST", "/v1/grade", content=trickle(*[(0.05, bytes(100))] * 8)).json() == 800


def test_no_body_is_waited_for_without_end():
    api, _ = application(limits=Limits(**LIMITS, grade_seconds=0.3))
    fast = trickle(*[(0.05, bytes(1000))] * 40)
    assert problem(ask(api, "POST", "/v1/grade", content=fast)) == (408, "slow_body")


def test_the_time_that_we_take_is_not_the_clients():
    api, _ = application(limits=Limits(**LIMITS))

    @api.post("/v1/busy")
    async def busy(request: Request) -> int:
        size = 0
        async for piece in request.stream():
            await asyncio.sleep(0.15)
            size += len(piece)
        return size

    assert ask(api, "POST", "/v1/busy", content=trickle(*[(0, b"x")] * 4)).json() == 4


def during(api: FastAPI, inside: Callable[[httpx.AsyncClient], Any], path: str, **options: Any) -> None:
    """Run `inside` during a request to `path`."""

    async def scenario() -> None:
        api.state.go_on = asyncio.Event()
        async with client(api) as session:
            waiting = asyncio.create_task(session.post(path, **options))
            await asyncio.sleep(0.05)
            await inside(session)
            api.state.go_on.set()
            await waiting

    run(scenario())


def test_more_requests_than_there_is_room_for_are_refused_unread():
    api, load = application(limits=Limits(in_flight=1))
    load.observe(2.0)
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"x"

    async def inside(session: httpx.AsyncClient) -> None:
        refused = await session.post("/v1/grade", content=body())
        assert problem(refused) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) == load.retry_after() >= 1
        assert (await session.get("/")).status_code == 200  # the page and the probes are always answered

    during(api, inside, "/v1/wait")
    assert not read
    assert load.in_flight.total == 0 and ask(api, "POST", "/v1/grade").status_code == 200


def test_uploads_that_are_slow_do_not_take_the_room_of_others():
    api, load = application(limits=Limits(in_flight=1, uploads=2))

    async def inside(session: httpx.AsyncClient) -> None:
        assert (load.uploads.total, load.in_flight.total) == (1, 0)
        assert (await session.post("/v1/grade")).status_code == 200
        second = asyncio.create_task(session.post("/v1/grade", content=trickle((0.1, b"x"))))
        await asyncio.sleep(0.01)
        assert problem(await session.post("/v1/grade")) == (503, "overloaded")
        assert (await second).status_code == 200

    during(api, inside, "/v1/grade", content=trickle((0.3, b"x")))
    assert (load.uploads.total, load.in_flight.total) == (0, 0)


def test_the_bodies_that_are_held_are_bounded_together():
    api, load = application(limits=Limits(grade_bytes=1000, other_bytes=1000, held_bytes=1000))

    async def inside(session: httpx.AsyncClient) -> None:
        assert load.held_bytes.total == 600
        assert problem(await session.post("/v1/grade", content=bytes(600))) == (503, "overloaded")
        assert (await session.post("/v1/grade", content=bytes(400))).status_code == 200
        # Of a batch one image at a time is held, which is not counted here.
        assert (await session.post("/v1/grade/batch", content=bytes(5000))).status_code == 200

    during(api, inside, "/v1/wait", content=bytes(600))
    assert load.held_bytes.total == 0


def test_a_client_that_goes_away_leaves_nothing_behind():
    api, load = application()

    async def scenario() -> None:
        async with client(api) as session:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await session.post("/v1/grade", content=trickle((0, b"x"), (5, b"y")))

    run(scenario())
    assert (load.uploads.total, load.in_flight.total, load.held_bytes.total) == (0, 0, 0)


def test_settings_travel_as_json():
    settings = Settings(keys=KeySettings(file="keys"), limits=Limits(in_flight=3))
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    with pytest.raises(ValidationError):
        Settings.model_validate({"limits": {"inflight": 3}})


def test_the_audit_log_tells_requests_that_were_let_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALP_KEYS", f"ann: {KEY} scope=admin")
    log = AuditLog(AuditSettings(folder=str(tmp_path / "audit")))
    api, _ = application(log, limits=Limits(grade_bytes=10))
    ask(api, "POST", "/v1/grade", headers=BEARER, content=bytes(11))
    ask(api, "POST", "/v1/grade", content=bytes(11))
    ask(api, "GET", "/v1/fails", headers=BEARER)
    ask(api, "POST", "/v1/bulk/x", headers=BEARER)
    with pytest.raises(RuntimeError):
        ask(api, "POST", "/v1/breaks", headers=BEARER)  # its status was sent before it failed
    log.close()
    (file,) = (tmp_path / "audit").glob("audit-*")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["key"], line["status"], line["problem"]) for line in lines] == [
        ("ann", 413, "too_many_bytes"),
        ("ann", 200, None),
        ("ann", 200, "broken_off"),
    ]


def test_those_who_send_at_once_are_no_more_than_there_is_room_for():
    async def scenario() -> None:
        api, load = application(limits=Limits(in_flight=2))
        async with client(api) as session:
            bodies = [trickle((0.1, b"x"), (0.1, b"y")) for _ in range(5)]
            asked = [asyncio.create_task(session.post("/v1/wait", content=body)) for body in bodies]
            while sum(each.done() for each in asked) < 3:  # refused
                await asyncio.sleep(0.01)
            assert load.in_flight.total == 2
            api.state.go_on.set()
            codes = [(await each).status_code for each in asked]
            assert sorted(codes) == [200, 200, 503, 503, 503]
            assert (load.uploads.total, load.in_flight.total, load.held_bytes.total) == (0, 0, 0)

    run(scenario())
