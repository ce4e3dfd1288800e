"""Batches without Ray: the lines, their order, the images in memory, and the end of a batch."""

from __future__ import annotations

import asyncio
import gzip
import json
import tarfile
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from cluster.haproxy import BATCH_PATH
from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.inference.decision import Grading
from scalp_core.results.schema import SCHEMA, Signature
from serving.admission.decoding import Decoders
from serving.admission.limits import Limits
from serving.admission.rate_limit import Admission
from serving.api import batch
from serving.api.middleware import RequestMiddleware
from serving.batch.window import Batches, BatchSettings
from serving.http import problems
from serving.http.problems import Refusal
from serving.replicas.ingress import replica
from serving.schemas.grading import GradeResponse
from tests.support import odd_archives as odd
from tests.support.virtual_time import run

SIGNATURE = Signature("made", "cpu fp32 openvino")
GRADING = Grading(1, "mild", [0.1, 0.7, 0.1, 0.1], 1.2, [1], None, False, [])


class Model:
    """Stub of the replica: slowly grades images that begin with `ok`, and counts those in flight."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.held = self.most = self.graded = self.refusals = 0

    async def grade(self, data: bytes) -> GradeResponse:
        if self.refusals:
            self.refusals -= 1
            raise Refusal(503, "overloaded", "full")
        if data == b"breaks":
            raise RuntimeError("secret detail")
        self.held += 1
        self.most = max(self.most, self.held)
        try:
            await asyncio.sleep(self.seconds)
            if not data.startswith(b"ok"):
                raise ImageError("not_an_image", "no picture")
            self.graded += 1
        finally:
            self.held -= 1
        answer = {"image_id": "i", "sha256": data[:8].decode(), "notes": [], **vars(SIGNATURE)}
        return GradeResponse(**answer, graded_at=datetime.now(UTC), **vars(GRADING))


def app_of(model: Model, **settings) -> FastAPI:
    async def version() -> str:
        return "made"

    async def grade(data: bytes) -> tuple[GradeResponse, int]:
        return await model.grade(data), 1

    batches = Batches(BatchSettings(**settings), grade, version, Admission(Limits(), Decoders()))
    api = FastAPI()
    api.add_middleware(RequestMiddleware)
    api.include_router(batch.router)
    problems.install(api)

    async def served() -> SimpleNamespace:  # a function that is not async would run in a thread
        return SimpleNamespace(batches=batches)

    api.dependency_overrides[replica] = served
    return api


def send(model: Model, request: dict, **settings) -> httpx.Response:
    """One request to the application."""

    async def scenario() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(model, **settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(BATCH_PATH, **request)

    return run(scenario())


def files(*datas: bytes, field: str = "file") -> dict:
    return {"files": [(field, ("../../etc/passwd", data)) for data in datas]}


def lines(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def refused(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    return response.status_code, response.json()["code"]


def test_a_line_each_in_the_order_of_the_parts_and_one_for_the_end():
    *rows, end = lines(send(Model(), files(b"ok 0", b"text", b"ok 2")))
    assert [row["member"] for row in rows] == ["0", "1", "2"]
    assert [row["status"] for row in rows] == ["graded", "failed", "graded"]
    assert all(list(row) == SCHEMA.names for row in rows)
    assert (rows[0]["sha256"], rows[1]["error_code"]) == ("ok 0", "not_an_image")
    assert rows[1]["model_version"] == "made" and len(rows[1]["sha256"]) == 64
    assert end == {"status": "done", "graded": 2, "failed": 1}


def test_a_photograph_that_is_too_large_fails_alone():
    *rows, end = lines(send(Model(), files(b"ok", bytes(MAX_BYTES + 1), b"ok")))
    assert [row["error_code"] for row in rows] == [None, "too_many_bytes", None]
    assert rows[1]["sha256"] is None
    assert end["status"] == "done"


@pytest.mark.parametrize(
    ("images", "window", "settings"),
    [
        ([b"ok"] * 60, 5, {"in_flight": 5}),
        ([b"ok" + bytes(MAX_BYTES // 2)] * 6, 2, {"in_flight_bytes": MAX_BYTES + 10}),
    ],
)
def test_the_window_bounds_images_in_flight_by_number_and_by_bytes(images, window, settings):
    model = Model(1)
    assert len(lines(send(model, files(*images), **settings))) == len(images) + 1
    assert model.most == window


def test_a_full_queue_is_waited_for_but_not_for_ever():
    model = Model()
    model.refusals = 4
    assert lines(send(model, files(b"ok", b"ok")))[-1] == {"status": "done", "graded": 2, "failed": 0}
    model.refusals = 10**9
    assert refused(send(model, files(b"ok"), patience_s=0.2)) == (503, "overloaded")


@pytest.mark.parametrize("archive", [odd.zip_of, odd.tar_of, lambda each: gzip.compress(odd.tar_of(each))])
@pytest.mark.parametrize("bare", [True, False])
def test_members_of_an_archive_are_named_and_all_else_in_it_is_left_out(archive, bare):
    data = archive(
        [
            ("두피/a.jpg", b"ok a"),
            ("notes.txt", b"ok"),
            ("b.JPG", b"text"),
            ("in.zip", b"ok"),
            ("c.png", b"ok c"),
        ]
    )
    kind = {"content": data, "headers": {"Content-Type": "application/x-tar"}}
    *rows, end = lines(send(Model(), kind if bare else files(data, field="archive")))
    assert [row["member"] for row in rows] == ["두피/a.jpg", "b.JPG", "in.zip", "c.png"]
    assert [row["error_code"] for row in rows] == [None, "not_an_image", "nested_archive", None]
    assert end == {"status": "done", "graded": 2, "failed": 2}


def test_a_tar_is_graded_while_it_comes_in():
    """The body waits for the first line with 40 pieces in transit; held back lines would never end it."""
    model, seen = Model(), asyncio.Event()
    tar = odd.tar_of([(f"{number}.jpg", b"ok" + bytes(100_000)) for number in range(40)])

    async def body() -> AsyncIterator[bytes]:
        for at in range(0, len(tar), 50_000):
            if at > len(tar) // 2:
                await seen.wait()
            yield tar[at : at + 50_000]

    async def graded(data: bytes) -> GradeResponse:
        seen.set()
        return await Model.grade(model, data)

    model.grade = graded
    headers = {"Content-Type": "application/x-tar"}
    assert lines(send(model, {"content": body(), "headers": headers}))[-1]["graded"] == 40


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


GOOD = [(f"{number}.jpg", b"ok" * 500) for number in range(8)]
TEXTS = [(f"{number}.txt", b"") for number in range(30)]
LONG = "x" * 2000 + ".jpg"


@pytest.mark.parametrize(
    ("data", "settings", "code"),
    [
        (b"this is no archive", {}, "bad_archive"),
        (b"", {}, "bad_archive"),
        (cut(odd.zip_of(GOOD)), {}, "bad_archive"),
        (odd.zip_of(GOOD), {"zip_bytes": 300}, "too_many_bytes"),
        (odd.zip_of(GOOD), {"photographs": 7}, "too_many_photographs"),
        (odd.zip_of(TEXTS), {"archive_members": 20}, "bad_archive"),
        (odd.tar_of(TEXTS), {"archive_members": 20}, "bad_archive"),
    ],
    ids=["text", "empty", "cut zip", "large zip", "many", "many in zip", "many in tar"],
)
def test_an_archive_that_is_refused_before_its_first_photograph_is_a_problem(data, settings, code):
    response = send(Model(), files(data, field="archive"), **settings)
    assert refused(response)[1] == code
    if code == "too_many_bytes":
        assert "/v1/bulk" in response.json()["detail"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_damaged_tar_is_graded_up_to_the_damage_and_aborted(pack):
    *rows, end = lines(send(Model(), files(cut(pack(odd.tar_of(GOOD))), field="archive")))
    assert all(row["status"] == "graded" for row in rows)
    assert (end["status"], end["error_code"]) == ("aborted", "bad_archive")
    assert (end["graded"], end["failed"]) == (len(rows), 0)


def test_names_of_members_are_labels_and_short():
    tar = odd.tar_of(
        [("../../etc/a.jpg", b"ok"), ("/b.jpg", b"ok"), (LONG, b"ok"), ("a\nb\x1b[2J.jpg", b"ok")]
    )
    *rows, _ = lines(send(Model(), files(tar, field="archive")))
    assert [row["member"] for row in rows] == ["../../etc/a.jpg", "/b.jpg", LONG[:1024], "a\nb\x1b[2J.jpg"]
    assert [row["error_code"] for row in rows] == [None, None, "bad_name", None]


@pytest.mark.medium
def test_bombs_in_archives_end_early():
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 1300 * 2**20
    packer = zlib.compressobj(1, wbits=31)  # gzip
    head, mebibyte = (
        packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH) for data in (info.tobuf(), bytes(2**20))
    )
    *rows, end = lines(send(Model(), files(head + 1300 * mebibyte, field="archive")))
    assert [row["error_code"] for row in rows] == ["too_many_bytes"]
    assert "bomb" in end["error"] and end["error_code"] == "bad_archive"
    *rows, end = lines(send(Model(), files(odd.overlapping_zip(1000, bytes(10_000)), field="archive")))
    assert [row["error_code"] for row in rows] == ["fetch_failed"]


def test_whole_requests_that_are_refused():
    assert refused(send(Model(), {"files": [("other", b"ok")]})) == (422, "no_file")
    assert refused(send(Model(), files(odd.zip_of([("a.txt", b"")]), field="archive"))) == (422, "no_file")
    assert refused(send(Model(), {"json": {"file": "x"}})) == (415, "unsupported_body")
    assert refused(send(Model(), {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}})) == (
        400,
        "bad_form",
    )
    assert refused(send(Model(), files(b"breaks"))) == (500, "internal")
    end = lines(send(Model(), files(b"ok", b"breaks", b"ok")))[-1]
    assert (end["status"], end["error_code"], end["graded"]) == ("aborted", "internal", 1)
    assert "secret" not in str(end)
    both = files(b"ok")["files"] + files(odd.tar_of(GOOD), field="archive")["files"]
    assert lines(send(Model(), {"files": both}))[-1]["error_code"] == "mixed_batch"
    assert lines(send(Model(), files(*[b"ok"] * 4), photographs=3))[-1] == {
        "status": "aborted", "error_code": "too_many_photographs",
        "error": "the limit is 3 parts; divide the form", "graded": 3, "failed": 0,
    }  # fmt: skip


class Connection:
    """ASGI connection of a client."""

    def __init__(self, body: bytes, piece: int = 2**16) -> None:
        head = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        self.pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
        self.sent: list[dict] = []
        self.read = 0
        self.gone = asyncio.Event()
        self.scope = {
            "type": "http", "method": "POST", "path": BATCH_PATH, "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
        }  # fmt: skip
        assert head in body

    async def receive(self) -> dict:
        if not self.pieces:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        piece = self.pieces.pop(0)
        self.read += len(piece)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(self, message: dict) -> None:
        self.sent.append(message)


def body_of(count: int, size: int) -> bytes:
    data = b"ok" + bytes(size)
    part = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + data + b"\r\n"
    return part * count + b"--x--\r\n"


def test_no_more_of_a_body_is_read_than_the_window_takes():
    """With a blocked model, the body is read up to the window."""

    async def scenario() -> None:
        model, connection = Model(3600), Connection(body_of(200, 60_000))
        app = app_of(model, in_flight=8)
        task = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.3)
        assert model.held == 8
        assert connection.read < 10 * 61_000 + 2**18
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert model.held == 0

    run(scenario())


def test_a_client_that_reads_nothing_before_it_has_sent_all_gets_its_answers():
    """The server blocks `send` until the body is read; graded lines must not block the reading."""

    async def scenario() -> None:
        connection = Connection(body_of(300, 10_000))
        whole = asyncio.Event()

        async def receive() -> dict:
            message = await connection.receive()
            if not connection.pieces:
                whole.set()
                message["more_body"] = False
            return message

        async def send(message: dict) -> None:
            await whole.wait()
            connection.sent.append(message)

        await app_of(Model())(connection.scope, receive, send)
        assert len(connection.sent) == 303  # the start, 300 images, the end, and an empty piece

    run(scenario())


def test_when_the_client_goes_away_the_work_stops():
    async def scenario() -> None:
        model, connection = Model(3600), Connection(body_of(4, 100))
        connection.pieces.append(b"")
        api = app_of(model)
        task = asyncio.create_task(api(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.2)
        assert model.held == 4
        connection.gone.set()
        await task
        assert (model.held, connection.sent) == (0, [])

    run(scenario())


def test_no_more_batches_and_archives_than_there_is_room_for():
    async def scenario() -> None:
        model = Model(3600)
        api = app_of(model, requests=2, archives=1)
        busy = [Connection(body_of(1, 10)) for _ in range(2)]
        tasks = [asyncio.create_task(api(each.scope, each.receive, each.send)) for each in busy]
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            answer = await client.post(BATCH_PATH, **files(b"ok"))
            assert refused(answer) == (503, "overloaded") and int(answer.headers["retry-after"]) > 0
            busy[0].gone.set()
            await tasks[0]
            model.seconds = 0
            assert lines(await client.post(BATCH_PATH, **files(b"ok")))[-1]["graded"] == 1
        busy[1].gone.set()
        await tasks[1]

    run(scenario())
