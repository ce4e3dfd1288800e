"""What `scalp submit` does not send to a real cluster with a token: each mistake is one line, soon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from cluster.jobs_api import Jobs
from cluster.resources import ClusterError
from tests.support.nodes import nodes
from tests.support.ports import free_port
from tests.support.submitting import SOON, TOKEN, refused, scalp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def far(s3):
    with nodes(workers=0, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as found:
        yield found


def test_mistakes_are_told_before_anything_is_sent(far, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(os.urandom(101 * 2**20))
    at = ("submit", "--address", far.url)
    s3 = ("s3://scalp/far/bundle", "s3://scalp/far/photographs", "s3://scalp/far/x")
    assert "photos is on this machine" in refused(*at, "grade", s3[0], "photos", s3[2])
    assert "photos/a.jpg (101 MiB)" in refused(*at, "--include", "photos", "grade", *s3)
    assert "use `serve deploy" in refused(*at, "serve", s3[0])
    assert "no such command" in refused(*at, "grad", *s3)
    assert "--env NOTHING: it is not set here" in refused(*at, "--env", "NOTHING", "grade", *s3)
    code, printed = scalp(*at, "grade", "--no-such-option", *s3, seconds=SOON)
    assert code == 2 and "no such option" in printed


def test_a_cluster_that_cannot_be_had_is_told(far):
    words = ("grade", "s3://scalp/b", "s3://scalp/p", "s3://scalp/o")
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert "cannot reach" in refused("submit", "--address", nowhere, *words)
    assert "does not take this token" in refused(
        "submit", "--address", far.url, *words, RAY_AUTH_TOKEN="c" * 40
    )
    assert "wants a token" in refused("submit", "--address", far.url, *words, RAY_AUTH_MODE="disabled")
    assert "no cluster is named; give its dashboard, --address" in refused("submit", *words)
    assert "write http://HOST:8265" in refused("submit", "--address", "ray://127.0.0.1:10001", *words)


def test_another_ray_there_is_told(far):
    class Old(BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"version": "4", "ray_version": "2.50.0", "ray_commit": "x"}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(ClusterError, match=f"runs Ray 2.50.0 and this machine {ray.__version__}"):
            Jobs(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_other_packages_there_are_told_before_the_work(far, tmp_path):
    """As the job does it, with a package here that is not what it is there."""
    versions = tmp_path / "versions.json"
    versions.write_text(json.dumps({"timm": "0.1", "ray": ray.__version__}))
    command = [
        sys.executable,
        "-m",
        "jobs.submit.entry",
        "--versions",
        str(versions),
        "grade",
        "s3://a",
        "s3://b",
        "s3://c",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=far.environment | {"RAY_ADDRESS": far.address},
        timeout=60,
    )
    assert done.returncode == 2, done
    assert re.search(r"node 127\.0\.0\.\d has timm [\d.]+ there and 0.1 here", done.stdout), done
