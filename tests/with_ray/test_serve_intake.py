"""Batches and bulk grading through `scalp serve` as one starts it: real HTTP, a real S3 server, real jobs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import psutil
import pytest

from cluster.haproxy import BATCH_PATH
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.results.schema import SCHEMA
from serving.schemas.bulk import BulkRow
from tests.support import odd_archives as odd
from tests.support.images import jpeg
from tests.support.result_rows import read_results
from tests.support.served import BULK_OUT as OUT
from tests.support.served import BULK_SOURCES as SOURCES
from tests.support.served import PRECISION, Served

PHOTOGRAPHS = [jpeg(seed) for seed in range(12)]
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILES = [(f"{number}.jpg", PHOTOGRAPHS[number]) for number in range(6)] + [("cut.jpg", PHOTOGRAPHS[1][:9000])]


RAY = "from cluster.local import connect; connect(); print('ready', flush=True); input()"


@pytest.fixture(scope="module")
def another_ray() -> Iterator[None]:
    """Another Ray of this machine, which must not get the jobs of the endpoint."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RAY], env=os.environ | {"RAY_ADDRESS": ""}, **pipes) as ray:
        assert ray.stdout and ray.stdout.readline() == "ready\n"
        yield
        ray.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def client(endpoint: Served, another_ray: None) -> Iterator[httpx.Client]:
    """A client of the endpoint."""
    storage.write(f"{SOURCES}/it's one.zip", odd.zip_of(FILES))
    for number in range(40):
        storage.write(f"{SOURCES}/many/{number}.jpg", FILES[0][1])
    storage.write("s3://scalp/bulk/in-other/a.jpg", FILES[0][1])
    storage.write(f"{SOURCES}/prepared/data.json", b"{}")
    with httpx.Client(base_url=endpoint.origin, timeout=60) as client:
        yield client


def lines(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def check(rows: list[dict], bundle, photographs: list[bytes] = PHOTOGRAPHS) -> None:
    """Each line is the answer to its photograph, with the fields of a bulk row."""
    predictor = Predictor(load_bundle(str(bundle)), "cpu", PRECISION)
    pixels = np.stack([decode(data, predictor.spec.preprocess).pixels for data in photographs])
    for row, truth in zip(rows, predictor.grade(pixels), strict=True):
        assert list(row) == SCHEMA.names
        np.testing.assert_allclose(row["probabilities"], truth.probabilities, atol=1e-5)
        assert row["model_version"] == predictor.spec.model_version


def test_files_and_archives_are_graded_alike(client, bundle):
    *rows, end = lines(client.post(BATCH_PATH, files=[("file", ("a.jpg", data)) for data in PHOTOGRAPHS]))
    check(rows, bundle)
    assert [row["member"] for row in rows] == [str(number) for number in range(12)]
    assert end == {"status": "done", "graded": 12, "failed": 0}
    members = [(f"session/{number}.jpg", data) for number, data in enumerate(PHOTOGRAPHS)]
    for pack in (odd.zip_of, odd.tar_of):
        *rows, end = lines(client.post(BATCH_PATH, files={"archive": ("a", pack(members))}))
        check(rows, bundle)
        assert [row["member"] for row in rows] == [name for name, _ in members]


def test_a_bad_photograph_is_a_line_and_the_rest_is_graded(client, bundle):
    datas = [PHOTOGRAPHS[0], PHOTOGRAPHS[1][:9000], b"", PHOTOGRAPHS[2]]
    *rows, end = lines(client.post(BATCH_PATH, files=[("file", ("a.jpg", data)) for data in datas]))
    assert [row["error_code"] for row in rows] == [None, "truncated", "empty", None]
    check([rows[0], rows[3]], bundle, [datas[0], datas[3]])
    assert rows[1]["model_version"] == rows[0]["model_version"]
    assert end == {"status": "done", "graded": 2, "failed": 2}


def part(data: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n"


@contextmanager
def connection(client: httpx.Client) -> Iterator[tuple[Callable, Callable]]:
    """A chunked request whose body and answer are on their way at once; httpx reads when it has sent all."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as raw:
        head = f"POST {BATCH_PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        raw.sendall((head + f"Content-Type: {FORM['Content-Type']}\r\n\r\n").encode())

        def send(data: bytes, last: bool = False) -> None:
            raw.sendall(b"%x\r\n" % len(data) + data + b"\r\n" + (b"0\r\n\r\n" if last else b""))

        def receive() -> bytes:
            data = raw.recv(2**16)
            assert data, "the connection was closed"
            return data

        yield send, receive


def test_the_first_line_comes_before_the_body_has_ended(client):
    with connection(client) as (send, receive):
        send(part(PHOTOGRAPHS[0]) + part(PHOTOGRAPHS[1]))
        answer = b""
        while b'"member":"0"' not in answer:
            answer += receive()
        assert b'"done"' not in answer
        send(b"--x--\r\n", last=True)
        while b'"done"' not in answer:
            answer += receive()
        assert b'"member":"1"' in answer


def grown(endpoint: Served, client: httpx.Client, count: int, data: bytes) -> int:
    """Bytes by which the replica that meets the network grows, at most, while a batch is answered."""
    ((_, pid),) = endpoint.replicas()
    replica = psutil.Process(pid)
    before, most = replica.memory_info().rss, 0

    def body() -> Iterator[bytes]:
        nonlocal most
        for _ in range(count):
            yield part(data)
            most = max(most, replica.memory_info().rss - before)
        yield b"--x--\r\n"

    rows = lines(client.post(BATCH_PATH, content=body(), headers=FORM))
    assert rows[-1] == {"status": "done", "graded": count, "failed": 0}
    return most


def test_a_large_batch_is_answered_in_constant_memory(endpoint, client):
    data = jpeg(0, (1400, 1050))
    for _ in range(3):  # the first ones load modules and fill the arenas of threads
        grown(endpoint, client, 100, data)
    most = 8 * 2**20
    assert most < 400 * len(data) / 4
    # An allocator may take memory once; what is kept of each image is taken each time.
    assert any(grown(endpoint, client, 400, data) < most for _ in range(3))


def ask(client: httpx.Client, source: str) -> httpx.Response:
    return client.post("/v1/bulk", json={"source": source})


def wait(client: httpx.Client, work: str, *statuses: str) -> dict:
    until = time.monotonic() + 100
    while (found := client.get(f"/v1/bulk/{work}").json())["status"] not in statuses:
        assert time.monotonic() < until and found["status"] in ("pending", "running"), found
        time.sleep(0.3)
    return found


def test_one_is_stopped_and_another_is_graded_to_its_end(client, bundle):
    stopped = ask(client, f"{SOURCES}/many")
    assert stopped.status_code == 202
    work = stopped.json()["id"]
    assert stopped.headers["location"] == f"/v1/bulk/{work}" == stopped.json()["links"]["work"]
    assert ask(client, f"{SOURCES}/many/").json()["id"] == work  # the same
    refused = ask(client, f"{SOURCES}/it's one.zip")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_jobs")
    assert int(refused.headers["retry-after"]) > 0
    wait(client, work, "running")
    assert client.delete(f"/v1/bulk/{work}").status_code == 202
    assert wait(client, work, "stopped")["links"]["report"] is None
    assert client.get(f"/v1/bulk/{work}/report").json()["code"] == "no_report_yet"
    assert client.get(f"/v1/bulk/{work}/results").json()["code"] == "no_results_yet"

    started = ask(client, f"{SOURCES}/it's one.zip").json()
    assert re.fullmatch(r"bulk-[0-9a-f]{20}", started["id"])
    assert (started["source"], started["out"]) == (f"{SOURCES}/it's one.zip", f"{OUT}/{started['id']}")
    found = wait(client, started["id"], "succeeded", "failed")
    assert (found["status"], found["error"]) == ("succeeded", None)
    assert found["photographs"] == {"done": 7, "failed": 1, "total": 7}
    assert found["photographs_per_second"] > 0
    assert found["model_version"] == load_bundle(str(bundle)).spec.model_version
    again = ask(client, f"{SOURCES}/it's one.zip")
    assert (again.status_code, again.json()) == (200, found)

    report = client.get(found["links"]["report"])
    assert report.headers["content-type"] == "text/html; charset=utf-8"
    policy = report.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script" not in policy and "sandbox" in policy
    assert report.content == storage.read(f"{found['out']}/report.html")
    files = client.get(found["links"]["files"]).json()
    assert [name for name in files["files"] if not re.fullmatch(r"results/part-[\d-]+\.parquet", name)] == []
    rows = read_results(f"{files['out']}/results").to_pylist()
    pages = [BulkRow.model_validate(row) for row in client.get(found["links"]["results"]).json()["rows"]]
    assert [row.location_id for row in pages] == [row["location_id"] for row in rows]
    table = client.get(found["links"]["results"], headers={"Accept": "text/csv"})
    assert len(table.text.splitlines()) == 1 + len(rows)
    online = client.post("/v1/grade", files={"file": FILES[0][1]}).json()
    (row,) = (row for row in rows if row["member"] == "0.jpg")
    assert row["probabilities"] == pytest.approx(online["probabilities"], abs=1e-5)


def test_a_job_that_fails_says_why_in_one_line(client):
    """Prepared data is a list of photographs that lie anywhere."""
    work = ask(client, f"{SOURCES}/prepared").json()["id"]
    found = wait(client, work, "failed", "succeeded")
    assert found["status"] == "failed"
    assert found["error"].endswith("names images stored elsewhere, which --no-tables refuses")


@pytest.mark.parametrize(
    "source",
    [
        "s3://scalp/bulk/in-other",
        "s3://scalp/bulk",
        f"{SOURCES}/../in-other",
        f"{SOURCES}/%2e%2e/in-other",
        "/etc",
        "http://127.0.0.1:8265/api/jobs/",
    ],
)
def test_sources_elsewhere_are_refused(client, source):
    answer = ask(client, source)
    assert (answer.status_code, answer.json()["code"]) == (403, "source_not_allowed")


def test_ids_that_are_none_are_not_found(client):
    for work in ("bulk-0", "..%2f..%2fbulk-" + "0" * 20, "bulk-" + "0" * 20):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/report"), ("GET", "/results")):
            answer = client.request(method, f"/v1/bulk/{work}{path}")
            assert answer.status_code == 404, (work, path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"


def test_bodies_that_are_none_are_refused(client):
    for body in ({}, {"source": 7}, {"source": SOURCES, "out": "s3://x"}, []):
        answer = client.post("/v1/bulk", content=json.dumps(body))
        assert answer.status_code == 422 and "s3://x" not in answer.text, body
