"""Requests to a cluster's dashboard by Ray's client over HTTP; the stub answers like Ray 2.60."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import ray

from cluster.jobs_api import Jobs
from cluster.local import ClusterError
from jobs.submit import logs

# Of a head that an autoscaler reports to, without a node, and of one without an autoscaler.
GROWS = "======== Autoscaler status: 2026-11-28 18:21:42.035417 ========\nNode status\n (no active nodes)"
STAYS = "No cluster status. It may take a few seconds for the Ray internal services to start up."
HEAD = {"state": "ALIVE", "resources_total": {"memory": 22e9, "node:__internal_head__": 1.0}}


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
        "/api/v0/nodes": {"data": {"result": {"result": [HEAD]}}},
        "/api/cluster_status": {"data": {"clusterStatus": STAYS}},
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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(url=url, asked=asked, answers=answers, jobs=jobs)
        server.shutdown()


def test_a_driver_for_a_gpu_is_not_refused_where_an_autoscaler_may_start_one(dashboard):
    dashboard.answers["/api/cluster_status"] = {"data": {"clusterStatus": GROWS}}
    Jobs(dashboard.url).check_capacity(cpus=0, gpus=1, memory=0)


@pytest.mark.parametrize("status", [STAYS, None])
def test_a_driver_that_no_node_holds_is_refused_where_none_will_come(dashboard, status):
    dashboard.answers["/api/cluster_status"] = {"data": {"clusterStatus": status}}
    with pytest.raises(
        ClusterError, match="has 1 GPU for the process that drives the job, the largest has 0"
    ):
        Jobs(dashboard.url).check_capacity(cpus=0, gpus=1, memory=0)


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
