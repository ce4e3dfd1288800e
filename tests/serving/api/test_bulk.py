"""Bulk runs without Ray: one job per run, attempts, limits, and the state from the output alone."""

from __future__ import annotations

import asyncio
import json
import shlex
import threading
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from ray.job_submission import JobStatus

from cluster.jobs_api import Jobs
from cluster.resources import ClusterError
from scalp_core.storage.outputs import SCRATCH_FOLDER
from serving.api import bulk
from serving.auth.scopes import ALL_RIGHTS, Caller
from serving.bulk import work as bulk_work
from serving.bulk.work import Bulk, ServedModel
from serving.http import problems
from serving.replicas.ingress import replica
from serving.schemas.bulk import BulkSettings

MESSAGE = """Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):
error: an older line
2026-11-26 something of Ray's
error: cannot read s3://b/x: it does not exist
hint:  check the path
"""


class Client(Jobs):
    """Ray's `JobSubmissionClient` without its requests."""

    address = "http://secret:8265"

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {"raysubmit_x": job("raysubmit_x"), "other": job(None)}
        self.commands: list[str] = []
        self.away = False

    def list_jobs(self):
        if self.away:
            raise ClusterError("cannot reach http://secret:8265")
        return list(self.jobs.values())

    def submit_job(self, entrypoint, submission_id, metadata, **_):
        if submission_id in self.jobs:
            self._raise_error(SimpleNamespace(text=f"{submission_id} already exists.", status_code=500))
        self.commands.append(entrypoint)
        self.jobs[submission_id] = job(submission_id, JobStatus.PENDING, metadata)

    def stop_job(self, submission_id):
        self.jobs[submission_id].status = JobStatus.STOPPED


def job(submission_id, status=JobStatus.RUNNING, metadata=None):
    known = {"submission_id": submission_id, "status": status, "metadata": metadata, "message": MESSAGE}
    nothing = {"type": "SUBMISSION", "entrypoint": "", "driver_exit_code": None, "end_time": None}
    return SimpleNamespace(**known, **nothing, start_time=1)


def replace_ray(monkeypatch, client: Client) -> None:
    """Let `client` answer for the Job API of this Ray; a query of Ray's address would start a Ray."""
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(bulk_work.Jobs, "of_this_ray", lambda: client)


class Endpoint:
    """The routes of a `Bulk` with stubs of Ray and the model."""

    def __init__(self, folder, monkeypatch, **settings) -> None:
        self.client, self.served = Client(), ServedModel("s3://models/scalp", "made-1", "bf16")
        self.loaded = "made-1"
        monkeypatch.setattr(
            bulk_work, "read_spec", lambda _: SimpleNamespace(version_in=lambda _: self.loaded)
        )
        self.out = f"{folder}/out"
        (folder / "in").mkdir()

        async def served() -> ServedModel:
            return self.served

        work = Bulk(BulkSettings(sources=[f"{folder}/in"], out=self.out, **settings), served)
        replace_ray(monkeypatch, self.client)
        self.source = f"{folder}/in"
        self.work, self.api = work, app_of(work)

    def ask(self, method: str = "POST", path: str = "", source: str | None = None) -> httpx.Response:
        return ask(self.api, method, path, source or self.source)


def app_of(work: Bulk | None) -> FastAPI:
    api = FastAPI()
    api.include_router(bulk.router)
    problems.install(api)
    api.dependency_overrides[bulk.caller] = lambda: Caller(None, ALL_RIGHTS)
    api.dependency_overrides[replica] = lambda: SimpleNamespace(bulk=work)
    return api


def ask(api: FastAPI, method: str, path: str, source: str) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            body = {"json": {"source": source}} if method == "POST" else {}
            return await client.request(method, f"/v1/bulk{path}", **body)

    return asyncio.run(request())


@pytest.fixture
def endpoint(tmp_path, monkeypatch) -> Endpoint:
    return Endpoint(tmp_path, monkeypatch)


def refused(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    return response.status_code, response.json()["code"]


def test_the_same_work_is_one_job_and_a_failed_one_is_tried_again(endpoint):
    first = endpoint.ask().json()
    assert (first["status"], first["links"]["report"]) == ("pending", None)
    assert endpoint.ask().json() == first
    assert endpoint.ask(source=f"{endpoint.source}/").json() == first
    endpoint.client.jobs[f"{first['id']}.1"].status = JobStatus.FAILED
    failed = endpoint.ask("GET", f"/{first['id']}").json()
    assert (failed["status"], failed["error"]) == (
        "failed", "cannot read s3://b/x: it does not exist; check the path",
    )  # fmt: skip
    again = endpoint.ask().json()
    assert (again["id"], again["status"], again["error"]) == (first["id"], "pending", None)
    assert [each for each in endpoint.client.jobs if each.startswith("bulk")] == [
        f"{first['id']}.1", f"{first['id']}.2",
    ]  # fmt: skip
    assert endpoint.ask("DELETE", f"/{first['id']}").json()["status"] == "stopped"


def test_another_source_or_model_is_other_work(tmp_path, monkeypatch):
    endpoint = Endpoint(tmp_path, monkeypatch, jobs=3)
    ids = {endpoint.ask().json()["id"], endpoint.ask(source=f"{endpoint.source}/x").json()["id"]}
    endpoint.served = ServedModel("s3://models/scalp2", "made-2", "bf16")
    endpoint.loaded = "made-2"
    ids.add(endpoint.ask().json()["id"])
    assert len(ids) == 3
    assert refused(endpoint.ask(source=f"{endpoint.source}/y")) == (429, "too_many_jobs")


def test_the_command_has_the_source_as_one_word(tmp_path, monkeypatch):
    endpoint = Endpoint(tmp_path, monkeypatch, options=["--heatmaps", "0"])
    source = f"{endpoint.source}/it's; rm -rf $HOME `x` --replicas"
    work = endpoint.ask(source=source).json()["id"]
    address, _, *words = shlex.split(endpoint.client.commands[0])
    assert address == "RAY_ADDRESS=10.0.0.1:6379"  # of this Ray, whatever others the machine has
    assert words == [
        "-P", "-m", "jobs.cli", "grade", "s3://models/scalp", source, f"{endpoint.out}/{work}",
        "--no-tables", "--no-links", "--precision", "bf16", "--heatmaps", "0",
    ]  # fmt: skip


def test_a_bundle_that_is_another_now_is_not_graded_with(endpoint):
    endpoint.loaded = "made-2"
    assert refused(endpoint.ask()) == (409, "bundle_changed")
    assert endpoint.client.commands == []


def test_what_ray_forgot_is_read_from_the_output(endpoint, tmp_path):
    work = endpoint.ask().json()["id"]
    endpoint.client.jobs.clear()
    assert refused(endpoint.ask("GET", f"/{work}")) == (404, "no_such_job")
    out = tmp_path / "out" / work
    (out / SCRATCH_FOLDER / "sessions").mkdir(parents=True)
    write(out / "run.json", {"sources": [endpoint.source], "model_version": "made-1"})
    write(out / SCRATCH_FOLDER / "listing.json", {"groups": [{"photographs": 500, "tars": 0}]})
    for number in (1, 2):
        write(
            out / SCRATCH_FOLDER / "sessions" / f"{number}.json",
            {"photographs": 100, "failed": 3, "seconds": 10},
        )
    found = endpoint.ask("GET", f"/{work}").json()
    assert (found["status"], found["photographs_per_second"]) == ("stopped", 10)
    assert found["photographs"] == {"done": 200, "failed": 6, "total": 500}
    write(
        out / "summary.json",
        {"rows": 500, "failed": 7, "rows_unaccounted": 0, "photographs_per_second": 50.0},
    )
    assert endpoint.ask().status_code == 200  # nothing is left to do
    found = endpoint.ask("GET", f"/{work}").json()
    assert (found["status"], found["photographs"]["done"]) == ("succeeded", 500)
    (out / "report.html").write_bytes(b"<p>" * 200_000)
    assert endpoint.ask("GET", f"/{work}/report").content == b"<p>" * 200_000


def write(path, content) -> None:
    path.write_text(json.dumps(content))


def test_a_ray_that_does_not_answer_is_a_problem_that_passes(endpoint):
    endpoint.client.away = True
    answer = endpoint.ask()
    assert refused(answer) == (503, "jobs_unavailable") and "secret" not in answer.text


def test_storage_that_cannot_be_read_is_a_problem_in_one_line(endpoint, tmp_path):
    work = endpoint.ask().json()["id"]
    (tmp_path / "out" / work / "run.json").mkdir(parents=True)  # in place of a file
    for method, path in (("POST", ""), ("GET", f"/{work}"), ("GET", ""), ("DELETE", f"/{work}")):
        answer = endpoint.ask(method, path)
        assert refused(answer) == (503, "storage_unavailable"), (method, path)
        detail = answer.json()["detail"]
        assert "run.json" in detail and "\n" not in detail
    assert len(endpoint.client.commands) == 1  # the POST started no second job


def test_storage_that_does_not_answer_is_not_awaited_for_ever(endpoint, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(bulk_work, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(bulk_work, "read_progress", lambda _: may_end.wait())
    try:
        assert refused(endpoint.ask("GET", f"/bulk-{'0' * 20}")) == (503, "jobs_unavailable")
    finally:
        may_end.set()


def test_a_model_that_does_not_answer_is_not_awaited_for_ever(endpoint, monkeypatch):
    monkeypatch.setattr(bulk_work, "_MODEL_TIMEOUT_S", 0.01)
    monkeypatch.setattr(endpoint.work, "_served", lambda: asyncio.sleep(3600))
    answer = endpoint.ask()
    assert refused(answer) == (503, "model_unavailable") and int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", ["", "/bulk-" + "0" * 20, "/bulk-" + "0" * 20 + "/report"])
def test_it_is_off_unless_it_is_turned_on(path):
    answer = ask(app_of(None), "GET" if path else "POST", path, "s3://bkt/x")
    assert refused(answer) == (404, "bulk_not_offered") and "--bulk-source" in answer.json()["detail"]
