"""Isolation of keys: every route of `/v1/` with every kind of key, through the authorization."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from ray.job_submission import JobStatus

from scalp_core import storage
from scalp_core.results.schema import SCHEMA
from serving.admission.limits import Load
from serving.api import bulk
from serving.api.middleware import install
from serving.auth.keys import KeySettings
from serving.auth.scopes import NO_RIGHTS, Caller
from serving.bulk import rows as bulk_rows
from serving.bulk import work as bulk_work
from serving.bulk.owners import Owners
from serving.bulk.work import Bulk, ServedModel
from serving.client import AsyncClient
from serving.http import problems
from serving.observability.audit import AuditLog
from serving.observability.audit_writer import AuditSettings
from serving.replicas.ingress import replica
from serving.schemas.bulk import BulkRow, BulkSettings
from serving.settings import Settings
from tests.serving.api.test_bulk import Client, replace_ray

KEYS = {name: f"a-key-of-{name}-that-is-long-enough" for name in (
    "ann", "ann2", "ben", "grader", "plain", "admin", "past", "wide",
)}  # fmt: skip
ROWS = 2_500


class Endpoint:
    """Authorization and routes of bulk runs, with stubs of Ray, the model and the other routes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.client = folder, Client()
        for name in ("ann", "ben"):
            (folder / "in" / name).mkdir(parents=True)
        self.rewrite()
        work = Bulk(BulkSettings(sources=[f"{folder}/in"], out=f"{folder}/out", jobs=9), self._served)
        replace_ray(monkeypatch, self.client)
        monkeypatch.setattr(bulk_work, "read_spec", lambda _: SimpleNamespace(version_in=lambda _: "made-1"))
        monkeypatch.setattr("serving.auth.keys._RELOAD_S", 0)
        self.log = AuditLog(AuditSettings(folder=f"{folder}/audit"))
        settings = Settings(keys=KeySettings(file=f"{folder}/keys.txt"))
        self.api = FastAPI()
        install(self.api, settings, Load(settings.limits), self.log)
        self.api.include_router(bulk.router)
        for path in ("/v1/grade", "/v1/grade/batch", "/v1/model"):
            self.api.add_api_route(path, lambda: "graded", methods=["GET", "POST"])
        problems.install(self.api)
        self.api.dependency_overrides[replica] = lambda: SimpleNamespace(bulk=work)

    async def _served(self) -> ServedModel:
        return ServedModel("s3://models/scalp", "made-1", "bf16")

    def rewrite(self, **changed: str) -> None:
        """The key file, with other scopes of some."""
        scopes = {
            "ann": f"scope=bulk:{self.folder}/in/ann",
            "ann2": f"scope=bulk:{self.folder}/in/ann scope=grade",
            "ben": f"scope=bulk:{self.folder}/in/ben",
            "grader": "scope=grade",
            "plain": "",
            "admin": "scope=admin",
            "past": "scope=admin expires=2020-01-01",
            "wide": f"scope=bulk:{self.folder} scope=grade",
        } | changed
        file = self.folder / "keys.txt"
        file.write_text("".join(f"{name}: {KEYS[name]} {scopes[name]}\n" for name in scopes))
        file.chmod(0o600)

    def ask(self, name: str, method: str, path: str, accept: str = "*/*", **options: Any) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, client=("8.8.8.8", 123))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                headers = {"Accept": accept}
                if name in KEYS:
                    headers["Authorization"] = f"Bearer {KEYS[name]}"
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(request())

    def start(self, name: str, source: str) -> httpx.Response:
        return self.ask(name, "POST", "/v1/bulk", json={"source": f"{self.folder}/in/{source}"})

    def runs(self, name: str) -> set[str]:
        return {run["id"] for run in self.ask(name, "GET", "/v1/bulk").json()["runs"]}

    def finish(self, work: str) -> None:
        """What `scalp grade` leaves: a report, and rows in two files of several row groups."""
        out = self.folder / "out" / work
        (out / "results").mkdir(parents=True)
        write(out / "run.json", {"sources": ["x"], "model_version": "made-1"})
        summary = {"rows": ROWS, "failed": 1, "rows_unaccounted": 0, "photographs_per_second": 9.0}
        write(out / "summary.json", summary)
        (out / "report.html").write_text("<p>an image")
        for number, count in enumerate((1_700, ROWS - 1_700)):
            rows = [row(1_700 * number + place) for place in range(count)]
            table = pa.Table.from_pylist(rows, SCHEMA)
            name = f"part-0000{number}-000.parquet"
            pq.write_table(table, out / "results" / name, row_group_size=600)

    def audited(self) -> list[dict[str, Any]]:
        self.log.close()
        (file,) = (self.folder / "audit").glob("audit-*")
        return [json.loads(line) for line in file.read_text().splitlines()]


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def row(number: int) -> dict[str, Any]:
    return {
        "image_id": f"{number:x}", "location_id": str(number), "uri": "/in/a.zip", "sha256": f"{number:x}",
        "member": "=HYPERLINK(1)" if number == 0 else f"두피/{number}.jpg", "status": "graded", "grade": 2,
        "grade_name": "moderate", "probabilities": [0.1, 0.2, 0.6, 0.1], "expected_severity": 1.7,
        "grade_set": [1, 2], "refer": True, "refer_reasons": ["severe"], "notes": [],
        "model_version": "made-1", "computed_by": "cpu", "graded_at": 1_700_000_000_000,
    }  # fmt: skip


@pytest.fixture
def endpoint(tmp_path, monkeypatch) -> Endpoint:
    return Endpoint(tmp_path, monkeypatch)


def outcome(response: httpx.Response) -> int | str:
    return response.status_code if response.is_success else response.json()["code"]


UNKNOWN = "no_such_job"
# Of a run that ann started: each route, and what each kind of key gets.
NAMES = ("ann", "ann2", "ben", "wide", "grader", "plain", "admin", "past", "nobody")
OF_A_RUN = (200, UNKNOWN, UNKNOWN, UNKNOWN, "forbidden", "forbidden", 200, "expired_key", "no_key")
OF_GRADES = ("forbidden", 200, "forbidden", 200, 200, 200, 200, "expired_key", "no_key")
TABLE = {
    ("POST", "/v1/grade"): OF_GRADES,
    ("POST", "/v1/grade/batch"): OF_GRADES,
    ("GET", "/v1/model"): OF_GRADES,
    ("GET", "/v1/bulk/{id}"): OF_A_RUN,
    ("GET", "/v1/bulk/{id}/report"): OF_A_RUN,
    ("GET", "/v1/bulk/{id}/results"): OF_A_RUN,
    ("GET", "/v1/bulk/{id}/files"): OF_A_RUN,
    ("DELETE", "/v1/bulk/{id}"): (202, *OF_A_RUN[1:6], 202, *OF_A_RUN[7:]),
    ("GET", "/v1/bulk"): (*[200] * 4, "forbidden", "forbidden", 200, "expired_key", "no_key"),
    ("POST", "/v1/bulk"): (
        200, 200, "forbidden", 200, "forbidden", "forbidden", 200, "expired_key", "no_key",
    ),
}  # fmt: skip


def test_the_table_has_every_route(endpoint):
    routes = {(method, each.path) for each in bulk.router.routes for method in each.methods}
    assert routes <= TABLE.keys()


def test_every_route_with_every_kind_of_key(endpoint):
    work = endpoint.start("ann", "ann").json()["id"]
    endpoint.client.jobs.clear()
    endpoint.finish(work)
    for (method, path), expected in TABLE.items():
        for name, wanted in zip(NAMES, expected, strict=True):
            body = {"source": f"{endpoint.folder}/in/ann"}
            options = {"json": body} if (method, path) == ("POST", "/v1/bulk") else {}
            answer = endpoint.ask(name, method, path.format(id=work), **options)
            assert outcome(answer) == wanted, (method, path, name, answer.text[:300])
            if wanted == "forbidden":  # it names the scope, here with the client's own source, and no prefix
                assert str(endpoint.folder) not in answer.text.replace(body["source"], "")


def test_an_id_of_another_is_answered_as_one_that_nobody_has(endpoint):
    work = endpoint.start("ann", "ann").json()["id"]
    for method, path in TABLE:
        if "{id}" in path:
            theirs, none = (
                endpoint.ask("ben", method, path.format(id=id_)).json() for id_ in (work, "bulk-" + "0" * 20)
            )
            assert theirs | {"request_id": ""} == none | {"request_id": ""}
    assert endpoint.client.jobs[f"{work}.1"].status == "PENDING"  # nobody stopped it


def test_keys_that_start_the_same_work_own_it_together(endpoint):
    work = endpoint.start("ann", "ann").json()["id"]
    other = endpoint.start("ben", "ben").json()["id"]
    assert endpoint.start("ann2", "ann").json()["id"] == work != other
    assert len(endpoint.client.commands) == 2
    assert [endpoint.runs(name) for name in ("ann", "ann2", "ben", "wide")] == [
        {work},
        {work},
        {other},
        set(),
    ]
    assert endpoint.runs("admin") == {work, other}
    assert endpoint.ask("ann2", "DELETE", f"/v1/bulk/{work}").json()["status"] == "stopped"
    assert endpoint.ask("ann", "GET", f"/v1/bulk/{work}").json()["status"] == "stopped"


def test_an_owner_whose_scope_was_taken_back_sees_it_no_more(endpoint):
    work = endpoint.start("ann", "ann").json()["id"]
    endpoint.rewrite(ann=f"scope=bulk:{endpoint.folder}/in/ben")
    assert outcome(endpoint.ask("ann", "GET", f"/v1/bulk/{work}")) == UNKNOWN
    assert endpoint.runs("ann") == set()
    endpoint.rewrite()
    assert endpoint.runs("ann") == {work}


def test_a_start_that_is_refused_owns_nothing(endpoint):
    endpoint.client.away = True
    assert outcome(endpoint.start("ann", "ann")) == "jobs_unavailable"
    endpoint.client.away = False
    assert endpoint.runs("ann") == endpoint.runs("admin") == set()
    assert not (endpoint.folder / "out").exists()


def test_an_id_of_dots_owns_nothing_of_others(endpoint):
    owners = Owners(f"{endpoint.folder}/out")
    owners.add(Caller("..", NO_RIGHTS), "bulk-" + "1" * 20, f"{endpoint.folder}/in/ann")
    assert sorted(path.name for path in (endpoint.folder / "out").iterdir()) == ["owners"]
    assert owners.works("..") == {"bulk-" + "1" * 20} and owners.works(".") == set()


def where(limit: int, cursor: str | None) -> dict[str, Any]:
    return {"limit": limit} | ({"cursor": cursor} if cursor else {})


def test_a_list_has_pages(endpoint):
    for number in range(7):
        (endpoint.folder / "in" / "ann" / str(number)).mkdir()
        assert endpoint.start("ann", f"ann/{number}").status_code == 202
    found, cursor = [], None
    while True:
        page = endpoint.ask("ann", "GET", "/v1/bulk", params=where(3, cursor))
        found.append([run["id"] for run in page.json()["runs"]])
        if not (cursor := page.json()["next"]):
            break
    assert [len(page) for page in found] == [3, 3, 1]
    assert list(chain.from_iterable(found)) == sorted(endpoint.runs("ann"))


@pytest.fixture
def finished(endpoint) -> tuple[Endpoint, str]:
    work = endpoint.start("ann", "ann").json()["id"]
    endpoint.client.jobs.clear()
    endpoint.finish(work)
    return endpoint, f"/v1/bulk/{work}/results"


@pytest.mark.parametrize("limit", [1_000, 601, 999])
def test_pages_of_rows_hold_each_row_once_and_in_order(finished, limit):
    endpoint, path = finished
    found, cursor = [], None
    while True:
        page = endpoint.ask("ann", "GET", path, params=where(limit, cursor)).json()
        assert len(page["rows"]) <= limit
        found += page["rows"]
        if not (cursor := page["next"]):
            break
    assert [each["location_id"] for each in found] == [str(number) for number in range(ROWS)]
    assert list(found[0]) == SCHEMA.names == list(BulkRow.model_fields)
    assert BulkRow.model_validate(found[0]).grade_set == [1, 2]


def test_the_client_iterates_over_runs_and_rows(finished, monkeypatch):
    endpoint, path = finished
    for number in range(25):  # more than a page of the list
        (endpoint.folder / "in" / "ann" / str(number)).mkdir()
        assert endpoint.start("ann", f"ann/{number}").status_code == 202
        for each in endpoint.client.jobs.values():
            each.status = JobStatus.FAILED
    monkeypatch.setattr("serving.client._PAGE_ROWS", 999)

    async def through_the_client() -> tuple[list[str], list[str]]:
        async with AsyncClient("http://test", KEYS["ann"]) as client:
            client._http._transport = httpx.ASGITransport(endpoint.api)
            runs = [run.id async for run in client.bulk_list()]
            rows = [each.location_id async for each in client.bulk_rows(path.split("/")[3])]
            return runs, rows

    runs, rows = asyncio.run(through_the_client())
    assert path.split("/")[3] in runs and len(runs) == 26 and runs == sorted(set(runs))
    assert rows == [str(number) for number in range(ROWS)]


@pytest.mark.parametrize("cursor", ["x", "part-00000-000.parquet", "part-9-9.parquet.0", "../x.parquet.0"])
def test_a_cursor_of_something_else_is_refused(finished, cursor):
    endpoint, path = finished
    assert outcome(endpoint.ask("ann", "GET", path, params={"cursor": cursor})) == "bad_cursor"


def test_rows_come_as_lines_and_as_a_table(finished):
    endpoint, path = finished
    lines = endpoint.ask("ann", "GET", path, bulk_rows.NDJSON)
    assert lines.headers["content-type"].startswith(bulk_rows.NDJSON)
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert [each["location_id"] for each in rows] == [str(number) for number in range(ROWS)]
    table = endpoint.ask("ann", "GET", path, "text/html, text/csv;q=0.9")
    read = list(csv.DictReader(io.StringIO(table.content.decode("utf-8-sig"))))
    assert len(read) == ROWS and list(read[0]) == SCHEMA.names
    assert (read[0]["member"], read[0]["grade_set"], read[7]["member"]) == (
        "'=HYPERLINK(1)",
        "1;2",
        "두피/7.jpg",
    )


def test_a_stream_holds_a_batch_and_not_the_rows(finished, monkeypatch):
    endpoint, path = finished
    monkeypatch.setattr(bulk_rows, "_BATCH_ROWS", 50)
    folder = f"{endpoint.folder}/out/{path.split('/')[3]}/results"
    batches = list(bulk_rows.StoredRows(folder).batches())
    assert max(batch.num_rows for batch in batches) <= 50
    assert sum(batch.num_rows for batch in batches) == ROWS
    assert max(map(len, bulk_rows.encode_rows(iter(batches), bulk_rows.CSV))) < 50 * 1_000


def test_reads_starts_and_stops_are_audited_and_name_no_file(finished):
    endpoint, path = finished
    work = path.split("/")[3]
    endpoint.ask("ann", "GET", f"/v1/bulk/{work}")  # progress shows no image
    endpoint.ask("ann", "GET", f"/v1/bulk/{work}/report")
    endpoint.ask("ann", "GET", path, bulk_rows.CSV)
    endpoint.ask("ben", "GET", path)
    endpoint.ask("ann", "GET", "/v1/bulk/patient-kim/report")
    endpoint.ask("ann", "DELETE", f"/v1/bulk/{work}")
    endpoint.ask("grader", "GET", path)
    lines = endpoint.audited()
    seen = [
        (line["key"], line["route"], line["status"], line.get("work"), line.get("source")) for line in lines
    ]
    root = "/v1/bulk/{id}"
    assert seen == [
        ("ann", "/v1/bulk", 202, work, f"{endpoint.folder}/in/ann"),
        ("ann", f"{root}/report", 200, work, None),
        ("ann", f"{root}/results", 200, work, None),
        ("ben", f"{root}/results", 404, work, None),
        ("ann", f"{root}/report", 404, None, None),
        ("ann", root, 202, work, None),
        ("grader", None, 403, None, None),
    ]
    text = json.dumps(lines)
    assert "patient-kim" not in text and "part-0000" not in text and "8.8.8.8" not in text


def test_owners_are_stored_with_the_work(endpoint):
    work = endpoint.start("ann", "ann").json()["id"]
    content = json.loads(storage.read(f"{endpoint.folder}/out/owners/key-ann/{work}.json"))
    assert (content["key"], content["work"], content["source"]) == ("ann", work, f"{endpoint.folder}/in/ann")
