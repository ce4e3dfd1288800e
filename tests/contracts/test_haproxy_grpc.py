"""A real HAProxy in front of the gRPC server, which sends its requests through HAProxy again."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from grpc import StatusCode
from tritonclient.grpc.service_pb2 import ModelInferRequest

from cluster import haproxy
from cluster.haproxy import Grpc, Policy
from serving.admission.limits import Limits
from serving.api.grpc_server import GrpcServer, running
from serving.auth.keys import Keys, KeySettings
from tests.support import haproxy_process
from tests.support.certificates import make_certificate
from tests.support.haproxy_process import Proxy, write_configuration

GOOD = "a-key-that-the-endpoint-knows"
METHOD = "/inference.GRPCInferenceService/"
MODEL = b"\x0a\x05scalp"  # a ModelReadyRequest


def infer_request(*images: bytes) -> bytes:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)]}
    tensor["contents"] = {"bytes_contents": images}
    return ModelInferRequest(model_name="scalp", inputs=[tensor]).SerializeToString()


class Replica(BaseHTTPRequestHandler):
    """Stub of the endpoint, which knows one key."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.received.append({name.lower(): value for name, value in self.headers.items()})
        known = self.headers.get("Authorization") == f"Bearer {GOOD}"
        body = b"{}"
        self.send_response(200 if known or "/models/" not in self.path else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path, policy: Policy) -> Iterator[tuple[Proxy, list[dict[str, str]]]]:
    """HAProxy with gRPC, and the headers of the requests that a replica received."""
    replica = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    replica.received = []
    threading.Thread(target=replica.serve_forever, args=(0.02,), daemon=True).start()
    (folder / "keys").write_text(f"ann: {GOOD}")
    (folder / "keys").chmod(0o600)
    sockets = Grpc.of(folder, "127.0.0.1", 8001)
    keys = Keys(KeySettings(file=str(folder / "keys")))
    server = GrpcServer(Limits(), keys, 30, str(sockets.requests))
    try:
        with ExitStack() as stack:
            stack.enter_context(running(server, f"unix:{sockets.calls}"))
            proxy = stack.enter_context(
                haproxy_process.running(folder, policy, replica.server_port, grpc=True)
            )
            yield proxy, replica.received
    finally:
        replica.shutdown()
        replica.server_close()


def call(proxy: Proxy, method: str, key: str | None = None, *metadata: tuple[str, str]) -> StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        return status(channel, method, key, *metadata)


def status(channel: grpc.Channel, method: str, key: str | None, *metadata: tuple[str, str]) -> StatusCode:
    keys = [("authorization", f"Bearer {key}")] if key else []
    message = MODEL if method.startswith("Model") else b""
    try:
        channel.unary_unary(METHOD + method)(message, metadata=[*keys, *metadata], timeout=60)
    except grpc.RpcError as error:
        return error.code()
    return StatusCode.OK


def through_socket(folder: Path, address: str, key: str) -> int:
    """Status of a request as the gRPC server sends it for a client at `address`."""
    transport = httpx.HTTPTransport(uds=str(folder / "http.sock"))
    headers = {"x-forwarded-for": address, "authorization": f"Bearer {key}"}
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        return client.get("/v2/models/scalp", headers=headers).status_code


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])  # noqa: S104
def test_haproxy_listens_for_grpc_where_it_was_told_and_other_users_cannot_use_its_socket(tmp_path, host):
    write_configuration(tmp_path, host)
    environment = haproxy.environment(tmp_path, grpc=Grpc.of(tmp_path, host, 8001))
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-c", "-f", str(tmp_path / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**environment})
    assert done.returncode == 0 and "timeouts" not in done.stderr, done.stderr
    binds = [line.split() for line in (tmp_path / "haproxy.cfg").read_text().splitlines() if "bind " in line]
    assert ["bind", f"{host}:8001", "proto", "h2"] in binds
    assert ["bind", f"unix@{tmp_path}/http.sock", "mode", "600", "name", "scalp_grpc"] in binds


def test_a_call_has_the_limits_of_its_key_and_of_its_address(tmp_path):
    policy = Policy(requests_per_minute=60, burst=10, wrong_keys_per_minute=5, open_requests_per_minute=12)
    with serving(tmp_path, policy) as (proxy, _):
        assert Counter(call(proxy, "ModelReady", GOOD) for _ in range(12)) == {
            StatusCode.OK: 10,
            StatusCode.RESOURCE_EXHAUSTED: 2,
        }
        assert Counter(call(proxy, "ModelReady", f"guess-{number}") for number in range(7)) == {
            StatusCode.UNAUTHENTICATED: 5,
            StatusCode.RESOURCE_EXHAUSTED: 2,
        }
        assert Counter(call(proxy, "ServerReady") for _ in range(14)) == {
            StatusCode.OK: 12,
            StatusCode.RESOURCE_EXHAUSTED: 2,
        }
        # The same address over HTTP has used up both too.
        assert (proxy.get("/v2/models/scalp", "guess")[0], proxy.get("/readyz")[0]) == (429, 429)


def test_a_large_message_is_refused_with_the_code_of_its_limit(tmp_path):
    with serving(tmp_path, Policy(requests_per_minute=60, burst=1)) as (proxy, _):
        assert call(proxy, "ModelReady", GOOD) is StatusCode.OK
        with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
            metadata = [("authorization", f"Bearer {GOOD}")]
            image = infer_request(bytes(20 * 2**20))
            with pytest.raises(grpc.RpcError) as raised:
                channel.unary_unary(METHOD + "ModelInfer")(image, metadata=metadata, timeout=60)
        assert raised.value.details().startswith("too_many_requests: "), raised.value.details()


def test_wrong_keys_of_one_client_do_not_count_for_another(tmp_path):
    with serving(tmp_path, Policy(wrong_keys_per_minute=5)) as (proxy, received):
        assert proxy.get("/")[0] == 200  # HAProxy listens on its socket
        assert [through_socket(tmp_path, "192.0.2.7", f"guess-{number}") for number in range(7)] == (
            [401] * 5 + [429] * 2
        )
        assert received[-1]["x-forwarded-for"].endswith("192.0.2.7")
        assert through_socket(tmp_path, "2001:db8::1", "guess") == 401
        assert call(proxy, "ModelReady", "guess") is StatusCode.UNAUTHENTICATED


def test_a_client_cannot_choose_its_address(tmp_path):
    with serving(tmp_path, Policy()) as (proxy, received):
        for given in ("192.0.2.7", "::1", "192.0.2.7, 192.0.2.8"):
            assert call(proxy, "ServerReady", None, ("x-forwarded-for", given)) is StatusCode.OK
            assert set(received[-1]["x-forwarded-for"].split(", ")) == {"127.0.0.1"}
        assert proxy.get("/readyz", **{"X-Forwarded-For": "192.0.2.7"})[0] == 200
        assert received[-1]["x-forwarded-for"] == "127.0.0.1"


def test_the_grpc_server_learns_address_and_length_of_a_message_from_haproxy(tmp_path):
    class Echo(grpc.GenericRpcHandler):
        def service(self, details):
            metadata = {name: value for name, value in details.invocation_metadata if name.startswith("x-")}
            return grpc.unary_unary_rpc_method_handler(lambda _, __: json.dumps(metadata).encode())

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Echo()])
    server.add_insecure_port(f"unix:{tmp_path}/grpc.sock")
    server.start()
    try:
        with (
            haproxy_process.running(tmp_path, Policy(), None, grpc=True) as proxy,
            grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel,
        ):
            for size in (0, 7, 10**6):
                forged = [("x-message-bytes", "00000001"), ("x-forwarded-for", "192.0.2.7")]
                answer = channel.unary_unary(METHOD + "Any")(bytes(size), metadata=forged, timeout=60)
                assert json.loads(answer) == {
                    "x-message-bytes": f"{size:08X}",
                    "x-forwarded-for": "127.0.0.1",
                }
    finally:
        server.stop(None)


def test_other_bytes_on_the_port_are_refused(tmp_path):
    with serving(tmp_path, Policy()) as (proxy, received):
        for sent in (
            b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01" + b"\0" * 64,
            b"\xff" * 999,
        ):
            with socket.create_connection(("127.0.0.1", proxy.grpc_port), timeout=30) as connection:
                connection.sendall(sent)
                while connection.recv(4096):
                    pass
        assert received == [] and call(proxy, "ServerReady") is StatusCode.OK


def test_without_the_grpc_server_calls_fail_as_unavailable(tmp_path):
    with haproxy_process.running(tmp_path, Policy(), None, grpc=True) as proxy:
        assert call(proxy, "ServerReady") is StatusCode.UNAVAILABLE


def test_a_certificate_is_that_of_https(tmp_path):
    certificate = make_certificate(tmp_path)
    with serving(tmp_path, Policy(tls_certificate=str(certificate))) as (proxy, received):
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{proxy.grpc_port}", credentials) as channel:
            assert status(channel, "ModelReady", GOOD) is StatusCode.OK
        assert received[-1]["x-forwarded-proto"] == "https"
        assert call(proxy, "ServerReady") is StatusCode.UNAVAILABLE  # without TLS
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert json.loads(proxy.get("/v2/models/scalp", GOOD, trusted)[2]) == {}
