"""The client against a real server on loopback that fails according to a script."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from serving import client as module
from serving.client import AsyncClient, BulkRun, Client, FailedImage, FailedPhotograph, GradeError, Retries
from serving.client import retries as retries_module
from serving.client.retries import Attempts
from serving.schemas.grading import ExplainedResponse, GradeResponse, Heatmap

GRADED = GradeResponse(
    image_id="a" * 20,
    sha256="a" * 64,
    grade=2,
    grade_name="moderate",
    probabilities=[0.1, 0.1, 0.7, 0.1],
    expected_severity=1.8,
    grade_set=[2],
    unlikeness=None,
    refer=False,
    refer_reasons=[],
    notes=[],
    model_version="run-1",
    computed_by="cpu fp32 openvino",
    graded_at=datetime.now(UTC),
)
RUN = {"id": "r1", "status": "running", "source": "s3://a/b", "out": "s3://a/c", "links": {}, "graded": 7}
QUICK = Retries(attempts=4, seconds=10)


def problem(status, code, **headers):
    body = {"title": "x", "status": status, "detail": "why", "code": code, "request_id": "server-1"}
    return status, json.dumps(body).encode(), headers


def answer(body, status=200):
    return status, body.model_dump_json().encode() if hasattr(body, "model_dump_json") else body, {}


def reset(handler):
    """End the connection like a killed process."""
    handler.close_connection = True


def half(handler):
    """End in the middle of the response."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"status": "graded"')
    handler.close_connection = True


def slow(handler):
    time.sleep(0.5)
    reset(handler)


class Server:
    """Server that answers requests in order by `script`, and records them."""

    def __init__(self):
        self.script, self.asked = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, dict(self.headers), body))
                step = outer.script.pop(0)
                if callable(step):
                    step = step(self)
                if step:
                    status, data, headers = step
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_DELETE = do_POST  # noqa: N815

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(retries_module, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries_module, "_LONGEST_WAIT_S", 0.02)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


async def _collected(found):
    return [row async for row in found] if hasattr(found, "__aiter__") else await found


@pytest.fixture(params=["sync", "async"])
def run(request, server, monkeypatch):
    """Call a method by its name; return its result or exception, and the number of requests."""
    sent = []
    request_of = Attempts.request
    monkeypatch.setattr(Attempts, "request", lambda attempts: sent.append(attempts) or request_of(attempts))

    def run(name, *arguments, script=(), retries=QUICK, timeout=5.0, **options):
        server.script[:] = script
        sent.clear()

        def sync():
            with Client(server.url, "a-key", timeout, retries) as client:
                found = getattr(client, name)(*arguments, **options)
                return list(found) if name == "grade_batch" else found

        async def asynchronous():
            async with AsyncClient(server.url, "a-key", timeout, retries) as client:
                return await _collected(getattr(client, name)(*arguments, **options))

        try:
            found = sync() if request.param == "sync" else asyncio.run(asynchronous())
        except GradeError as error:
            found = error
        return found, len(sent)

    return run


def fields(body, headers):
    """Names and contents of the fields of a form."""
    form = BytesParser(policy=HTTP).parsebytes(
        f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body
    )
    return [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
        for part in form.iter_parts()
    ]


def test_grades_bytes_and_files_without_their_names(run, server, tmp_path):
    path = tmp_path / "private name.jpg"
    path.write_bytes(b"pixels")
    explained = ExplainedResponse(**dict(GRADED), heatmap=Heatmap(grade=1, png="", meaning="where it looked"))
    found, _ = run("grade", path, script=[answer(explained)], heatmap=True, heatmap_grade=1)
    assert found == explained
    _, asked, headers, body = server.asked[0]
    assert (asked, headers["Authorization"]) == ("/v1/grade", "Bearer a-key")
    sent = fields(body, headers)
    assert sorted(sent) == [("file", b"pixels"), ("heatmap", b"true"), ("heatmap_grade", b"1")]
    assert b"private" not in body
    run("grade", b"pixels", script=[answer(GRADED)])
    assert fields(server.asked[1][3], server.asked[1][2]) == [("file", b"pixels")]


@pytest.mark.medium
@pytest.mark.parametrize(
    "trouble",
    [reset, half, slow, problem(500, "internal"), (502, b"<html>", {}), problem(503, "overloaded")],
    ids=["reset", "half", "slow", "500", "502", "503"],
)
def test_trouble_that_passes_costs_no_grade(run, server, trouble, monkeypatch):
    request_of, timeouts = Attempts.request, [0.2, 0.2] if trouble is slow else []

    def impatient_at_first(attempts):
        return request_of(attempts) | ({"timeout": timeouts.pop()} if timeouts else {})

    monkeypatch.setattr(Attempts, "request", impatient_at_first)
    found, requests = run("grade", b"x", script=[trouble, trouble, answer(GRADED)], timeout=60)
    assert (found, requests) == (GRADED, 3)
    assert len({headers["X-Request-ID"] for _, _, headers, _ in server.asked}) == 1


@pytest.mark.medium
def test_waits_as_long_as_the_server_asks(run):
    started = time.monotonic()
    found, _ = run(
        "grade", b"x", script=[problem(429, "too_many_requests", **{"Retry-After": "1"}), answer(GRADED)]
    )
    assert found == GRADED
    assert time.monotonic() - started >= 1


@pytest.mark.medium
def test_does_not_wait_beyond_its_bounds(run, server):
    busy = problem(503, "overloaded", **{"Retry-After": "3600"})
    found, _ = run("grade", b"x", script=[busy] * 9)
    assert (found.code, found.status, found.retry_after) == ("overloaded", 503, 3600)
    assert len(server.asked) == 1
    found, requests = run("grade", b"x", script=[problem(503, "overloaded")] * 9)
    assert (found.code, requests) == ("overloaded", 4)
    found, _ = run("grade", b"x", script=[slow] * 9, timeout=0.1, retries=Retries(attempts=2))
    assert (found.code, found.status) == ("timed_out", None)


def test_a_refusal_is_told_and_not_asked_again(run, server):
    found, _ = run("grade", b"x", script=[problem(415, "not_an_image", **{"X-Request-ID": "visit-7"})])
    assert (found.code, found.detail, found.status, found.request_id) == (
        "not_an_image",
        "why",
        415,
        "visit-7",
    )
    assert "not_an_image" in str(found) and len(server.asked) == 1


def test_nobody_there(run, server):
    server.close()
    found, requests = run("grade", b"x")
    assert (found.code, found.status, requests) == ("unreachable", None, 4)
    assert run("ready")[0] is False


@pytest.mark.medium
def test_what_is_no_endpoint_is_said(run):
    found, _ = run("model", script=[(200, b"<html>hello</html>", {})] * 4)
    assert found.code == "bad_answer"


def test_probe_is_asked_once(run, server):
    assert run("ready", script=[answer(b'{"status": "ready"}')])[0] is True
    assert run("ready", script=[problem(503, "not_ready"), answer(b'{"status": "ready"}')])[0] is False
    assert [path for _, path, _, _ in server.asked] == ["/readyz"] * 2


def test_a_bulk_run_is_never_started_twice(run, server):
    accepted = (202, json.dumps(RUN).encode(), {})
    for unknown in (reset, half, problem(500, "internal")):
        found, requests = run("bulk", "s3://a/b", script=[unknown, accepted])
        assert isinstance(found, GradeError) and requests == 1
    found, requests = run("bulk", "s3://a/b", script=[problem(503, "overloaded"), accepted])  # not started
    assert (found, requests) == (BulkRun(**RUN), 2)
    assert json.loads(server.asked[-1][3]) == {"source": "s3://a/b"}


def test_a_bulk_run_is_followed_and_cancelled(run, server):
    found, _ = run("bulk_status", "r1", script=[reset, (200, json.dumps(RUN).encode(), {})])
    assert (found.status, found.model_extra) == ("running", {"graded": 7})
    run("bulk_cancel", "../v1/model", script=[(200, json.dumps(RUN).encode(), {})])
    assert [ask[:2] for ask in server.asked[1:]] == [
        ("GET", "/v1/bulk/r1"),
        ("DELETE", "/v1/bulk/..%2Fv1%2Fmodel"),
    ]


def rows(*members, failed=(), end="done"):
    """Lines of a batch in a given order, with their end."""
    lines = [GRADED.model_copy(update={"member": str(member)}).model_dump_json() for member in members]
    bad = {"status": "failed", "error_code": "truncated", "error": "ends early", "grade": None}
    lines += [json.dumps(bad | {"member": str(member)}) for member in failed]
    lines.append(json.dumps({"status": end, "graded": len(members), "failed": len(failed)}))
    return 200, "\n".join(lines).encode() + b"\n", {"Content-Type": "application/x-ndjson"}


@pytest.mark.medium
def test_batch_has_a_row_for_each_photograph_in_order(run, server, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_IMAGES", 3)
    taken = []

    def images():
        for index in range(7):
            taken.append(index)
            yield b"%d" % index

    script = [rows(2, 0, failed=[1]), half, rows(0, 1), rows(0, 1, 2, end="aborted"), rows(0, 1, 2), rows(0)]
    found, requests = run("grade_batch", images(), script=script)
    assert [row.member for row in found] == [str(index) for index in range(7)]
    assert [isinstance(row, FailedImage) for row in found] == [index == 1 for index in range(7)]
    assert found[1].error_code == "truncated" and found[0].grade == 2
    # Answers that broke off, lacked a row or were aborted were asked for again, whole.
    sent = [[int(data) for _, data in fields(body, headers)] for _, _, headers, body in server.asked]
    assert sent == [[0, 1, 2], *[[3, 4, 5]] * 4, [6]]
    assert requests == 6


def test_batch_takes_photographs_as_it_goes(server, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 10)
    server.script[:] = [rows(0, 1), rows(0)]
    taken = []

    def images():
        while True:
            taken.append(len(taken))
            yield bytes(5)

    with Client(server.url, retries=QUICK) as client:
        found = client.grade_batch(images())
        assert next(found).member == "0"
    assert len(taken) == 3


def test_former_names_are_accepted(run, server):
    found, _ = run("grade", script=[answer(GRADED)], photograph=b"pixels")
    assert found == GRADED
    found, _ = run("grade_batch", script=[rows(0, failed=[1])], photographs=[b"0", b"1"])
    assert [isinstance(row, FailedPhotograph) for row in found] == [False, True]
    sent = [[data for _, data in fields(body, headers)] for _, _, headers, body in server.asked]
    assert sent == [[b"pixels"], [b"0", b"1"]]
    assert module.Photograph is module.ImageInput


def test_an_image_under_both_names_is_refused(run):
    for arguments, options in ((), {"image": b"x"}), ((b"x",), {}):
        with pytest.raises(TypeError):
            run("grade", *arguments, photograph=b"y", **options)


@pytest.mark.medium
def test_needs_neither_ray_nor_pytorch():
    heavy = "{'ray', 'torch', 'openvino', 'fastapi', 'starlette'}"
    check = f"import sys, serving.client; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
