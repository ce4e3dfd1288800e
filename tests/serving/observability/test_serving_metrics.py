"""Metrics of the endpoint: each request once by its outcome, and drift of the last images."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from scalp_core.images import gates as image_gates
from scalp_core.inference.decision import Grading
from scalp_core.results import drift
from serving.admission.limits import MAX_BODY_BYTES, Load
from serving.api.middleware import RequestMiddleware
from serving.api.routes import create_api
from serving.observability import metrics
from serving.observability.metrics import DriftWindow
from serving.replicas.ingress import replica
from serving.settings import Settings
from tests.scalp_core.results.test_drift import LUMA, draw, spec


@pytest.fixture(scope="module")
def contract():
    return spec(image_gates.fit_gates(draw(4000, 0), draw(1000, 1)))


def gradings(grades) -> list[Grading]:
    return [Grading(int(grade), "", [], 0.0, [], None, False, []) for grade in grades]


def like_training(photographs: int, seed: int) -> tuple[list[Grading], np.ndarray]:
    return gradings(np.arange(photographs) % 4), draw(photographs, seed)


def add_in_batches(window: DriftWindow, answers: list[Grading], statistics: np.ndarray) -> None:
    for first in range(0, len(answers), 16):
        window.add(answers[first : first + 16], statistics[first : first + 16])


def test_drift_is_seen_while_it_lasts_and_not_after(contract):
    window = DriftWindow(contract, 1000)
    assert window.drift().level == "too_few"
    add_in_batches(window, *like_training(1000, 2))
    assert window.drift().level == "none"
    answers, dark = like_training(1000, 3)
    dark[:, LUMA] *= 0.7
    add_in_batches(window, answers, dark)
    assert window.drift().level == "strong"
    add_in_batches(window, *like_training(1000, 4))
    assert window.drift().level == "none"


def test_the_window_holds_the_last_photographs_wherever_batches_end(contract):
    window = DriftWindow(contract, 500)
    answers, statistics = like_training(1237, 5)
    add_in_batches(window, answers, statistics)
    counts = drift.count_statistics(statistics[-500:], contract.gates)
    by_grade = dict.fromkeys(contract.grade_names, 125)
    assert window.drift() == drift.measure_drift(counts, by_grade, contract)


def test_a_bundle_without_gates_is_compared_by_its_grades(contract):
    window = DriftWindow(contract.model_copy(update={"gates": None}))
    add_in_batches(window, gradings([3] * 800), draw(800, 6))
    assert window.drift().statistics is None
    assert window.drift().grades.level == "strong"


@pytest.fixture
def counted(monkeypatch):
    """Counted requests: path, status, outcome."""
    found = []

    def observe(_metrics, path, status, outcome, seconds):
        assert seconds > 0
        found.append((path, status, outcome))

    monkeypatch.setattr(metrics.RequestMetrics, "observe", observe)
    return found


def request(api: FastAPI, method: str, path: str, **options) -> None:
    async def send() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.request(method, path, **options)

    asyncio.run(send())


def test_requests_are_counted_by_route_and_by_how_they_ended(counted):
    settings = Settings()
    api = create_api(settings, Load(settings.limits), None)
    request(api, "GET", "/healthz")
    request(api, "GET", "/no/such/path/of-a-person.jpg")
    request(api, "GET", "/v1/grade")
    api.dependency_overrides[replica] = lambda: None  # which has no `describe`
    request(api, "GET", "/v1/model")
    request(api, "POST", "/v1/grade")
    request(api, "POST", "/v1/grade", files={"file": bytes(MAX_BODY_BYTES + 1)})
    assert counted == [
        ("/healthz", 200, "ok"),
        ("other", 404, "not_found"),  # never what was asked for: anybody could fill the memory with names
        ("/v1/grade", 405, "method_not_allowed"),
        ("/v1/model", 500, "internal"),
        ("/v1/grade", 415, "unsupported_body"),
        ("/v1/grade", 413, "too_many_bytes"),
    ]


def test_a_request_whose_client_goes_away_is_counted(counted):
    api = FastAPI()
    api.add_middleware(RequestMiddleware)

    @api.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(60)

    async def leave() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.get("/slow")

    asyncio.run(leave())
    assert counted == [("/slow", 499, "broken_off")]
