"""Requests to a cluster's dashboard by Ray's client over HTTP; the stub answers like Ray 2.60."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import ray

from cluster.jobs_api import Jobs
from cluster.resources import ClusterError
from jobs.submit import logs


def details(id_: str | None, status: str = "RUNNING") -> dict:
    return {
        "type": "SUBMISSION" if id_ else "DRIVER",
        "submission_id": id_,
        "status": status,
        "entrypoint": "x",
        "message": "Job has not started yet.",
        "metadata": {"command": "grade"},
    }


@pytest.fixture
def dashboard(monkeypatch):
    """Stub of a dashboard: its address, the requested paths, the responses by path, and jobs by id."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    asked: list[str] = []
    jobs: dict[str, dict] = {}
    answers = {
        "/api/version": {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"},
    }

    class Head(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            answer = list(jobs.values()) if path == "/api/jobs/" else answers.get(path)
            answer = answer if answer is not None else jobs.get(path.removeprefix("/api/jobs/"))
            body = json.dumps(answer).encode() if answer is not None else b"Job does not exist"
            self.send_response(200 if answer is not None else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(url=url, asked=asked, answers=answers, jobs=jobs)
        server.shutdown()


def test_a_job_is_asked_for_alone_and_not_with_all_that_the_cluster_ever_ran(dashboard):
    dashboard.jobs["scalp-grade-0123456789ab.2"] = details("scalp-grade-0123456789ab.2")
    dashboard.jobs["scalp-grade-0123456789ab.1"] = details("scalp-grade-0123456789ab.1", "FAILED")
    jobs = Jobs(dashboard.url)
    job = jobs.get("scalp-grade-0123456789ab.2")
    assert (job.attempt, job.status, job.command) == (2, "RUNNING", "grade")
    assert "/api/jobs/" not in dashboard.asked
    assert jobs.get("scalp-grade-0123456789ab") == job  # of the work: its last attempt


def test_what_nobody_submitted_is_no_job(dashboard):
    dashboard.jobs["01000000"] = details(None)
    jobs = Jobs(dashboard.url)
    for name in ("01000000", "scalp-grade-0123456789ab.7"):
        with pytest.raises(ClusterError, match=f"{name}: .* has no such job"):
            jobs.get(name)


def test_a_cluster_that_does_not_answer_or_is_not_trusted_is_one_line(dashboard):
    with pytest.raises(ClusterError, match=r"certificate that is not trusted here; .* REQUESTS_CA_BUNDLE"):
        Jobs(dashboard.url.replace("http:", "https:"))
    with pytest.raises(ClusterError, match=r"cannot reach http://127\.0\.0\.1:1; check the address"):
        Jobs("http://127.0.0.1:1")


def test_a_job_that_waits_for_its_node_is_told_once(dashboard, monkeypatch, capsys):
    states = iter(["PENDING"] * 4 + ["SUCCEEDED"])
    monkeypatch.setattr(logs, "_REPORT_PENDING_AFTER_S", 0.0)
    monkeypatch.setattr(logs, "_POLL_INTERVAL_S", 0.0)
    jobs = Jobs(dashboard.url)
    look = jobs.get
    dashboard.answers["/api/jobs/a.1/logs"] = {"logs": "done\n"}

    def get(id_):
        dashboard.jobs["a.1"] = details("a.1", next(states))
        return look(id_)

    monkeypatch.setattr(jobs, "get", get)
    assert logs.follow(jobs, "a.1") == 0
    printed = capsys.readouterr().out
    assert printed.count("a.1 is pending: Job has not started yet.") == 1, printed
