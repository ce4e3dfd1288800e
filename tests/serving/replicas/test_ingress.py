"""The routes of a real ingress over stubs of the deployments: a model that is slow, changes or dies."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.decision import Grading
from scalp_core.results.schema import Signature
from serving.api.routes import create_api
from serving.http import problems
from serving.replicas import ingress as module
from serving.replicas.handles import hash_of
from serving.replicas.ingress import Ingress, replica
from serving.schemas.grading import Graded
from serving.settings import Settings
from tests.support.images import jpeg

GRADED = Graded(
    Grading(2, "moderate", [0.1, 0.1, 0.7, 0.1], 1.8, [2], None, False, []),
    Signature("made-1", "cpu fp32"),
    "bundle",
    1,
    0.0,
    0.0,
)


class Slow(NamedTuple):
    """An answer that comes after a second, or never because its call is cancelled."""

    answer: Any


class Deployment:
    """Stub of a deployment's handle, whose methods raise or return their outcome."""

    def __init__(self, **outcomes: Any) -> None:
        self._outcomes = {"preprocess": Preprocess(size=32)} | outcomes
        self.calls: list[str] = []
        self.cancelled: list[str] = []

    def options(self, **_: object) -> Deployment:
        return self

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def call(*_: object) -> Any:
            self.calls.append(method)
            outcome = self._outcomes[method]
            if isinstance(outcome, Exception):
                raise outcome
            if not isinstance(outcome, Slow):
                return outcome
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                self.cancelled.append(method)
                raise
            return outcome.answer

        return SimpleNamespace(remote=call)


class Endpoint:
    """An ingress with its routes, called like by a server.

    Args:
        folder: Folder of the audit log.
        grader: Outcome of the grader's `grade`.
        explainer: Outcome of the explainer's `heatmap`.
        settings: Settings of the endpoint.
    """

    def __init__(self, folder: Path, grader: Any, explainer: Any = b"png", **settings: Any) -> None:
        self.grader, self.explainer = Deployment(grade=grader), Deployment(heatmap=explainer)
        self._settings = Settings(audit={"folder": str(folder)}, **settings)
        self._folder = folder

    def post(self, path: str = "/v1/grade", **body: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            ingress = Ingress(self._settings, self.grader, self.explainer, create_api)
            api = ingress.__serve_build_asgi_app__()
            api.dependency_overrides[replica] = lambda: ingress
            transport = httpx.ASGITransport(api, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                answer = await client.post(path, **(body or {"files": {"file": jpeg(0)}}))
            ingress.audit.close()
            return answer

        return asyncio.run(send())

    @property
    def audited(self) -> list[dict[str, Any]]:
        files = self._folder.glob("audit-*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def endpoint(monkeypatch, tmp_path) -> Callable[..., Endpoint]:
    # It patches Ray Serve for the rest of the process; test_request_queue.py tests it.
    monkeypatch.setattr(module, "bound_request_queue", lambda: None)
    return partial(Endpoint, tmp_path / "audit")


def refused(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == problems.MEDIA_TYPE
    return answer.status_code, answer.json()["code"]


def test_graded_image_is_answered_and_logged(endpoint):
    grades = endpoint(GRADED)
    answer = grades.post("/v1/grade?heatmap=true")
    assert (answer.status_code, answer.json()["grade"], answer.json()["heatmap"]["grade"]) == (200, 2, 2)
    (line,) = grades.audited
    assert (line["grade"], line["model_version"]) == (2, "made-1")


@pytest.mark.parametrize(
    ("grader", "explainer", "path"),
    [(Slow(GRADED), b"png", "/v1/grade"), (GRADED, Slow(b"png"), "/v1/grade?heatmap=true")],
    ids=["grader", "explainer"],
)
def test_request_without_an_answer_in_answer_seconds_is_refused_as_too_slow(
    endpoint, grader, explainer, path
):
    slow = endpoint(grader, explainer, answer_seconds=0.05, wedged_seconds=0.01)
    answer = slow.post(path)
    assert refused(answer) == (504, "too_slow")
    assert "0.05 s" in answer.json()["detail"]
    for deployment, outcome in ((slow.grader, grader), (slow.explainer, explainer)):
        if isinstance(outcome, Slow):
            assert deployment.cancelled == [call for call in deployment.calls if call != "preprocess"]
    (line,) = slow.audited
    assert (line["status"], line["problem"]) == (504, "too_slow")


def test_model_that_keeps_changing_is_refused(endpoint):
    changing = endpoint(Preprocess(size=48))
    assert refused(changing.post()) == (503, "model_changes")
    assert changing.grader.calls == ["preprocess", "grade", "grade", "grade"]


def test_full_queue_of_the_grader_is_refused_with_retry_after(endpoint):
    answer = endpoint(BackPressureError(num_queued_requests=8, max_queued_requests=8)).post()
    assert refused(answer) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1


def test_request_fails_after_the_death_of_three_replicas_in_a_row(endpoint):
    dying = endpoint(ActorDiedError())
    assert refused(dying.post()) == (500, "internal")
    assert dying.grader.calls == ["preprocess", "grade", "grade", "grade"]
    (line,) = dying.audited
    assert (line["status"], line["problem"]) == (500, "internal")


def test_heatmap_of_another_bundle_is_refused_in_one_line(endpoint):
    answer = endpoint(GRADED, UserError("the bundle has changed; try again")).post("/v1/grade?heatmap=true")
    assert refused(answer) == (422, "no_heatmap")
    assert answer.json()["detail"] == "the bundle has changed; try again"


def test_a_cached_answer_is_audited_and_charged_like_another_and_has_no_pass(endpoint):
    made = endpoint(GRADED, cache_mib=1, limits={"max_megapixels": 0.1, "megapixels_per_minute": 0.1})
    made.grader._outcomes["find_cached"] = (GRADED._replace(batch_size=0), ("first_frame_only",))
    answer = made.post()
    assert (answer.json()["grade"], answer.json()["notes"]) == (2, ["first_frame_only"])
    assert answer.headers["x-batch-size"] == "0" and made.grader.calls == ["find_cached"]
    (line,) = made.audited
    assert (line["sha256"], line["grade"], line["cached"]) == (hash_of(jpeg(0)), 2, True)
    many = [made.post("/v2/models/scalp/infer", json=infer(*[jpeg(0)] * n)).status_code for n in (2, 32)]
    assert many == [200, 413]


def test_an_image_is_graded_if_it_is_not_cached_or_needs_a_heatmap_or_nothing_is_cached(endpoint):
    made = endpoint(GRADED, cache_mib=1)
    made.grader._outcomes["find_cached"] = None
    assert made.post().status_code == 200 and made.grader.calls == ["find_cached", "preprocess", "grade"]
    assert "cached" not in made.audited[0]
    made.grader.calls.clear()
    assert made.post("/v1/grade?heatmap=true").json()["heatmap"]
    assert made.grader.calls == ["preprocess", "grade"]
    off = endpoint(GRADED)
    assert off.post().status_code == 200 and off.grader.calls == ["preprocess", "grade"]


def infer(*images: bytes) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}]}


def test_images_of_one_request_are_audited_one_by_one_and_charged_together(endpoint):
    path, images = "/v2/models/scalp/infer", [jpeg(0), jpeg(1)]
    both = endpoint(GRADED)
    assert both.post(path, json=infer(*images)).status_code == 200
    assert {line["sha256"] for line in both.audited} == {hash_of(data) for data in images}
    assert [line["grade"] for line in both.audited] == [2, 2]
    small = endpoint(GRADED, limits={"max_megapixels": 0.06, "megapixels_per_minute": 0.6})
    answer = small.post(path, json=infer(*images))
    assert answer.status_code == 413 and "megapixels" in answer.json()["error"]
    assert small.grader.calls == []


def test_one_image_that_is_damaged_refuses_its_request_and_is_audited(endpoint):
    made = endpoint(GRADED)
    answer = made.post("/v2/models/scalp/infer", json=infer(jpeg(0), b"no image"))
    assert answer.status_code == 415 and answer.json()["error"].startswith("image 1: ")
    assert {line.get("problem") for line in made.audited} == {None, "not_an_image"}


def test_a_version_of_the_request_that_another_model_replaced_is_not_answered(endpoint):
    made = endpoint(GRADED)
    made.grader._outcomes["describe"] = SimpleNamespace(model_version="made-0")
    assert made.post("/v2/models/scalp/versions/made-0/infer", json=infer(jpeg(0))).status_code == 503
