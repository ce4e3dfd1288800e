"""The routes as clients call them, through all middleware, with a stub of the model."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette import formparsers

from cluster.haproxy import CLOSED_PATHS
from scalp_core.errors import ImageError
from serving.admission.limits import Load
from serving.api import single
from serving.api.routes import create_api
from serving.auth.keys import KeySettings
from serving.observability.audit import AuditLog
from serving.replicas.ingress import replica
from serving.schemas.grading import GradeResponse
from serving.settings import Settings

KEY = "a-key-of-ann-that-is-long-enough"
CURLS_OWN = "application/x-www-form-urlencoded"  # of --data-binary without another
ANSWER = GradeResponse.model_construct(grade=2, status="graded")


class Model:
    """Stub of the ingress that records its calls."""

    bulk = None

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bool, int | None]] = []

    async def grade(self, data: bytes, heatmap: bool, of_grade: int | None) -> tuple[GradeResponse, int]:
        if not data:
            raise ImageError("not_an_image", "it is empty")
        self.asked.append((data, heatmap, of_grade))
        return ANSWER, 1

    async def is_ready(self) -> bool:
        return True


class Endpoint:
    """The whole application of a replica, called like by a server."""

    def __init__(self, audit: AuditLog | None = None, **settings: Any) -> None:
        self.model: Any = Model()
        self.audit, self.settings = audit, Settings(**settings)
        self.api: FastAPI = create_api(self.settings, Load(self.settings.limits), audit)
        self.api.dependency_overrides[replica] = lambda: self.model

    def ask(
        self, method: str, path: str, host: str = "localhost:8000", peer: str = "127.0.0.1", **options: Any
    ) -> httpx.Response:
        @asynccontextmanager
        async def session():
            transport = httpx.ASGITransport(self.api, client=(peer, 1))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                yield client

        async def send() -> httpx.Response:
            async with session() as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


def refused(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("kind", [*single.IMAGES, "IMAGE/JPEG; q=1"])
def test_an_image_may_be_the_body(endpoint, kind):
    answer = endpoint.ask(
        "POST", "/v1/grade?heatmap=true&heatmap_grade=3", content=b"bytes", headers={"Content-Type": kind}
    )
    assert (answer.status_code, answer.json()["grade"]) == (200, 2)
    assert endpoint.model.asked == [(b"bytes", True, 3)]


def test_an_image_may_be_a_field_of_a_form_with_options_there_or_in_the_query(endpoint):
    files = {"file": ("kim.jpg", b"bytes", "image/jpeg")}
    for path, data in (
        ("/v1/grade", {}),
        ("/v1/grade", {"heatmap": "true", "heatmap_grade": "1"}),
        ("/v1/grade?heatmap=true&heatmap_grade=3", {}),
        ("/v1/grade?heatmap=true&heatmap_grade=3", {"heatmap_grade": "0", "other": "x"}),
    ):
        assert endpoint.ask("POST", path, files=files, data=data).status_code == 200
    options = [(heatmap, grade) for _, heatmap, grade in endpoint.model.asked]
    assert options == [(False, None), (True, 1), (True, 3), (True, 0)]


def test_a_body_that_holds_no_image_is_refused_and_told_what_to_send(endpoint):
    two = [("file", b"one"), ("file", b"two")]
    file = {"file": b"x"}
    large = {"file": bytes(32 * 2**20 + 1)}
    for options, expected in (
        ({"content": b"x", "headers": {"Content-Type": CURLS_OWN}}, (415, "unsupported_body")),
        ({"content": b"x"}, (415, "unsupported_body")),
        ({"json": {"file": "x"}}, (415, "unsupported_body")),
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, (415, "not_an_image")),
        ({"files": {"photo": b"x"}}, (422, "no_file")),
        ({"files": two}, (422, "several_files")),
        ({"files": file, "data": {"heatmap_grade": "4"}}, (422, "bad_field")),
        ({"files": file, "data": {"heatmap": "perhaps"}}, (422, "bad_field")),
        ({"files": file, "data": {"heatmap": "0"}}, (422, "bad_field")),
        ({"files": large}, (413, "too_many_bytes")),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, (400, "bad_form")),
    ):  # fmt: skip
        assert refused(endpoint.ask("POST", "/v1/grade", **options)) == expected
    assert endpoint.model.asked == []
    assert refused(endpoint.ask("POST", "/v1/grade?heatmap_grade=4", files=file)) == (422, "bad_field")
    answer = endpoint.ask("POST", "/v1/grade", content=b"x")
    assert "image/jpeg" in answer.json()["detail"]


def test_no_image_touches_the_disk(endpoint, monkeypatch):
    def on_disk(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, on_disk)
    monkeypatch.setattr(formparsers, "SpooledTemporaryFile", on_disk)
    large = bytes(32 * 2**20)
    assert endpoint.ask("POST", "/v1/grade", files={"file": large}).status_code == 200
    headers = {"Content-Type": "image/png"}
    assert endpoint.ask("POST", "/v1/grade", content=large, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/page/main.js", "/openapi.json"])
def test_head_is_get_without_the_body(endpoint, path):
    head, get = endpoint.ask("HEAD", path), endpoint.ask("GET", path)
    assert (head.status_code, head.content) == (200, b"") and get.content
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == str(len(get.content))


def test_the_methods_that_a_path_takes_are_named(endpoint):
    answer = endpoint.ask("DELETE", "/healthz")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_slash_at_the_end_leads_nowhere_else(endpoint):
    large = {"files": {"file": bytes(200_000)}}
    for path in ("/v1/grade/", "/v1/grade"):
        assert endpoint.ask("POST", path, **large).status_code == 200
    assert endpoint.ask("GET", "/healthz/").status_code == 200
    assert endpoint.ask("GET", "/nothing/").status_code == 404  # no redirect to the Host of the client


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_without_keys_this_machine_is_answered(endpoint, host):
    answer = endpoint.ask(
        "POST", "/v1/grade", host, files={"file": b"x"}, headers={"Origin": f"http://{host}"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5:8000"]
)
def test_without_keys_a_name_that_was_made_to_lead_here_is_refused(endpoint, host):
    for method, path in (("GET", "/v1/bulk/bulk-0/report"), ("POST", "/v1/grade"), ("GET", "/v1/model")):
        assert refused(endpoint.ask(method, path, host)) == (403, "wrong_host")
    open_ = Endpoint(keys=KeySettings(open_to_network_without_keys=True))
    assert open_.ask("POST", "/v1/grade", host, files={"file": b"x"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:9000"])
def test_without_keys_the_page_of_another_site_sends_nothing_here(endpoint, origin):
    open_ = Endpoint(keys=KeySettings(open_to_network_without_keys=True))
    for each in (endpoint, open_):
        answer = each.ask("POST", "/v1/grade", files={"file": b"x"}, headers={"Origin": origin})
        assert refused(answer) == (403, "cross_origin")
    assert endpoint.model.asked == []


def test_with_keys_any_host_is_answered(monkeypatch):
    monkeypatch.setenv("SCALP_KEYS", f"ann: {KEY} scope=grade")
    answer = Endpoint().ask(
        "POST", "/v1/grade", "grade.clinic.example", "8.8.8.8",
        files={"file": b"x"}, headers={"Authorization": f"Bearer {KEY}", "Origin": "https://app.example"},
    )  # fmt: skip
    assert answer.status_code == 200


def test_the_description_of_the_api_is_complete(monkeypatch):
    monkeypatch.setenv("SCALP_KEYS", f"ann: {KEY}")
    document = Endpoint().ask("GET", "/openapi.json").json()
    text = json.dumps(document)
    assert text.count("RFC 9457") == 1  # one schema of a problem; there were 67
    assert "HTTPValidationError" not in text
    schemas = document["components"]["schemas"]
    used = {word.split('"')[0] for word in text.split("#/components/schemas/")[1:]}
    assert used == set(schemas)
    ids = []
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            assert operation["tags"] and operation["tags"][0] in {tag["name"] for tag in document["tags"]}
            assert operation.get("security") == ([{"key": []}] if path.startswith(CLOSED_PATHS) else None)
            expected = {"400", "429", "500", "503"}
            expected |= {"401", "403"} if path.startswith(CLOSED_PATHS) else set()
            expected |= {"408", "413"} if "requestBody" in operation else set()
            assert expected <= set(operation["responses"])
            for status, response in operation["responses"].items():
                assert "X-Request-ID" in response["headers"]
                assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
    assert sorted(ids) == sorted(set(ids)) and {"grade", "grade_batch", "model", "bulk_start"} <= set(ids)
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert set(document["paths"]["/v1/grade"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data", *single.IMAGES,
    }  # fmt: skip
    monkeypatch.delenv("SCALP_KEYS")
    assert "securitySchemes" not in Endpoint().ask("GET", "/openapi.json").json()["components"]
