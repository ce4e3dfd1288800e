"""A real HAProxy with the configuration of this Ray, hardened by `cluster.haproxy`."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import haproxy
from cluster.haproxy import Policy
from scalp_core.errors import UserError
from serving.auth.network import check_certificate
from tests.support import haproxy_process
from tests.support.certificates import make_certificate
from tests.support.haproxy_process import Proxy, write_configuration

GOOD = "a-key-that-the-endpoint-knows"


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """Start HAProxy like Ray, to check its configuration only."""
    program = haproxy.environment(folder)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    command = [program, "-c", "-f", str(folder / "haproxy.cfg")]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


class Replica(BaseHTTPRequestHandler):
    """Stub of the endpoint: accepts one key, and returns the headers about the client."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        known = self.headers.get("Authorization") == f"Bearer {GOOD}"
        body = json.dumps(dict(self.headers.items())).encode()
        self.send_response(200 if known or "/v1/" not in self.path else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def running(folder: Path, policy: Policy, replica: bool = True) -> Iterator[Proxy]:
    """Run HAProxy in front of a `Replica`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with haproxy_process.running(folder, policy, server.server_port if replica else None) as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("host", "listens"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "*")])  # noqa: S104
def test_what_ray_leaves_open_is_closed_and_the_endpoint_listens_where_it_was_told(
    tmp_path, host, listens, monkeypatch
):
    monkeypatch.delenv(haproxy.SECONDS_VARIABLE, raising=False)
    # If this fails, a new release of Ray may have settings for it.
    theirs = write_configuration(tmp_path, host)
    assert "timeout http-request" not in theirs and "bind *:8404" in theirs and "bind :9101" in theirs
    for _ in range(2):  # idempotent
        done = start(tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in (tmp_path / "haproxy.cfg").read_text().splitlines()]
        assert [line for line in lines if line.startswith("bind ")] == [
            "bind 127.0.0.1:9101",
            f"bind {listens}:8000",
            "bind 127.0.0.1:8404",
        ]
        for once in ("timeout http-request 15000ms", "option forwardfor"):
            assert lines.count(once) == 1
        assert not [line for line in lines if line.startswith(("option httplog", "errorfile"))]
        assert f"stats socket {tmp_path}/admin.sock mode 600 level admin expose-fd listeners" in lines


def test_another_configuration_is_not_started(tmp_path):
    theirs = write_configuration(tmp_path, "127.0.0.1")
    (tmp_path / "haproxy.cfg").write_text(theirs.replace("mode 666", "mode 660"))
    done = start(tmp_path)
    assert done.returncode != 0 and "Ray's configuration of HAProxy has 0 lines" in done.stderr


def test_two_endpoints_of_one_machine_share_neither_port_nor_file(tmp_path):
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(haproxy.environment(tmp_path / name))
    shared = {name for name in made[0] if made[0][name] == made[1][name]}
    assert shared == {
        *haproxy.COMMON_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_NBTHREAD",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        haproxy.POLICY_VARIABLE,
    }
    files = {name for name, value in made[0].items() if str(tmp_path) in value}
    # The sockets that Ray would put into /tmp, open to everybody, are in the folder too.
    assert files >= {"RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH", "RAY_SERVE_HAPROXY_SOCKET_PATH"}


def test_the_log_names_no_client_and_no_path(tmp_path):
    with running(tmp_path, Policy()) as proxy:
        proxy.get("/v1/bulk/patient-kim?name=Kim", GOOD)
        with socket.create_connection(("127.0.0.1", proxy.port)) as raw:
            raw.sendall(b"GET /patient-kim HTTP/1.1\r\nContent-Length: none\r\n\r\n")
            raw.recv(4096)
            address = raw.getsockname()[1]
        text = proxy.logged("GET 200", "connection failed")
    assert not re.search(rf"127\.0\.0\.1|kim|v1|{GOOD}|\b{address}\b", text, re.IGNORECASE)


def test_a_key_may_ask_so_often_and_another_is_not_refused_for_it(tmp_path):
    policy = Policy(requests_per_minute=60, burst=10, wrong_keys_per_minute=10**6)
    with running(tmp_path, policy) as proxy:
        assert proxy.statuses(15, "/v1/grade", GOOD) == {200: 10, 429: 5}
        assert proxy.statuses(5, "/v1/grade", "another") == {401: 5}
        assert proxy.statuses(20, "/", GOOD) == {200: 20}  # the page and the probes
        status, headers, body = proxy.get("/v1/model", GOOD)
        refused = proxy.get("/v2/models/scalp/infer", GOOD)
    problem = json.loads(body)
    assert refused[0] == 429 and json.loads(refused[2])["error"] == problem["detail"]
    assert (status, problem["code"], headers["content-type"]) == (
        429, "too_many_requests", "application/problem+json",
    )  # fmt: skip
    assert int(headers["retry-after"]) == 1 and headers["x-request-id"] == problem["request_id"]


def test_wrong_keys_are_refused_before_the_endpoint_and_a_right_one_is_heard(tmp_path):
    with running(tmp_path, Policy(wrong_keys_per_minute=5)) as proxy:
        assert proxy.get("/v1/model", GOOD)[0] == 200
        assert Counter(proxy.get("/v1/model", f"guess-{number}")[0] for number in range(9)) == {
            401: 5,
            429: 4,
        }
        assert proxy.get("/v1/model")[0] == 429  # none at all
        assert proxy.get("/v1/model", GOOD)[0] == 200


def test_probes_and_the_page_have_a_limit_for_each_address_and_keys_do_not_share_it(tmp_path):
    with running(tmp_path, Policy(open_requests_per_minute=6)) as proxy:
        assert proxy.statuses(10, "/readyz") == {200: 6, 429: 4}
        assert proxy.statuses(3, "/v1/grade", GOOD) == {200: 3}


def received(proxy: Proxy, path: str, **headers: str) -> dict[str, str]:
    """Headers that a replica receives."""
    _, _, body = proxy.get(path, GOOD, **headers)
    return {name.lower(): value for name, value in json.loads(body).items()}


def test_no_header_of_a_client_controls_ray(tmp_path):
    names = ["serve_multiplexed_model_id", "serve-multiplexed_model-id", "X_Session-Id", "x-session-id",
             "x-request_timeout-seconds", "X-Request-Disconnect_Disabled"]  # fmt: skip
    given = dict.fromkeys(names, "1") | {"Accept": "*/*", "Connection": "Upgrade", "Upgrade": "websocket"}
    given["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    with running(tmp_path, Policy()) as proxy:
        kept = received(proxy, "/v1/grade", **given)
        of_a_batch = received(proxy, "/prefix/v1/grade/batch/", **given)
    steering = ("serve", "session", "timeout", "disconnect", "upgrade")
    assert kept["accept"] == "*/*" and not [name for name in kept if any(word in name for word in steering)]
    assert of_a_batch["x-request-timeout-seconds"] == "0"  # a batch may take half an hour


def test_a_request_id_is_kept_if_it_is_short_and_printable(tmp_path):
    with running(tmp_path, Policy()) as proxy:
        for given in ("visit-7", "a,b", "x" * 128):
            assert received(proxy, "/", **{"X-Request-ID": given})["x-request-id"] == given
        for given in ("x" * 129, "two words", "\xff"):
            assert "x-request-id" not in received(proxy, "/", **{"X-Request-ID": given})  # Ray makes one


def ask(port: int, opened: ExitStack) -> bool:
    """Open a connection, and return whether a request on it is answered; otherwise it is closed."""
    try:  # a connection that is refused may end before `connect` returns
        connection = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: scalp\r\n\r\n")
        return connection.recv(4096) != b""
    except ConnectionError:
        return False


def test_an_address_has_so_many_connections(tmp_path):
    with running(tmp_path, Policy(address_connections=5)) as proxy:
        with ExitStack() as opened:
            assert [ask(proxy.port, opened) for _ in range(12)].count(True) == 5
        while True:  # HAProxy notices each end at its own time
            with ExitStack() as again:
                if ask(proxy.port, again):
                    break


def test_without_a_replica_the_answer_is_a_problem(tmp_path):
    with running(tmp_path, Policy(), replica=False) as proxy:
        status, headers, body = proxy.get("/v1/patient-kim")
    assert (status, json.loads(body)["code"], headers["retry-after"]) == (503, "not_ready", "2")
    assert b"kim" not in body


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_a_certificate_makes_it_https_and_the_endpoint_knows(tmp_path, certificate):
    check_certificate(str(certificate))
    trusted = ssl.create_default_context(cafile=str(certificate))
    with running(tmp_path, Policy(tls_certificate=str(certificate))) as proxy:
        status, _, body = proxy.get("/", trusted=trusted)
        headers = {name.lower(): value for name, value in json.loads(body).items()}
        assert (status, headers["x-forwarded-proto"]) == (200, "https")
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            proxy.get("/")  # without TLS


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path, certificate):
    missing, alone, loose = tmp_path / "missing.pem", tmp_path / "alone.pem", tmp_path / "loose.pem"
    alone.write_text(certificate.read_text().split("-----BEGIN PRIVATE KEY")[0])
    alone.chmod(0o600)
    loose.write_text(certificate.read_text())
    loose.chmod(0o644)
    for file, why in ((missing, "No such file"), (alone, "with its private key"), (loose, "chmod 600")):
        with pytest.raises(UserError, match=why):
            check_certificate(str(file))
    with pytest.raises(ValueError, match="syntax"):
        Policy(tls_certificate="/etc/two words.pem")


def test_the_policy_of_a_cluster_is_a_variable_and_a_wrong_one_is_named(monkeypatch):
    monkeypatch.setenv(haproxy.POLICY_VARIABLE, '{"burst": 7}')
    assert haproxy.policy_of_environment() == Policy(burst=7)
    for wrong in ("{", '{"brst": 7}', '{"burst": 0}'):
        monkeypatch.setenv(haproxy.POLICY_VARIABLE, wrong)
        with pytest.raises(ValueError, match=haproxy.POLICY_VARIABLE):
            haproxy.policy_of_environment()
