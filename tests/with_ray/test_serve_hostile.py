"""The endpoint and HAProxy under attack by bytes that no honest client sends: refused, and still serving."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc import StatusCode
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest

from cluster.haproxy import Policy
from serving.admission.limits import Limits
from serving.auth.keys import KeySettings, new_key
from serving.observability.audit_writer import AuditSettings
from serving.settings import Settings
from tests.support.images import jpeg
from tests.support.served import scalp_serve

PATIENCE = 1.0  # seconds that a body may keep the endpoint waiting
LATE = 30  # seconds after which something has not come, on a busy machine; less than time limits of HAProxy


@dataclass(frozen=True)
class Endpoint:
    port: int
    grpc_port: int
    key: str
    audit: Path

    def head(self, line: str, *headers: str) -> bytes:
        lines = [f"{line} HTTP/1.1", "Host: scalp", f"Authorization: Bearer {self.key}", *headers]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n"

    def grade(self, data: bytes, name: str = "a.jpg", **headers: str) -> httpx.Response:
        files = {"file": (name, data, "image/jpeg")}
        headers = {"Authorization": f"Bearer {self.key}", **headers}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/grade", files=files, headers=headers, timeout=60)

    def infer(self, message: bytes, *metadata: tuple[str, str], key: str | None = None) -> StatusCode:
        """Status of a call of gRPC."""
        metadata = (("authorization", f"Bearer {key or self.key}"), *metadata)
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            try:
                call(message, metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                return error.code()
        return StatusCode.OK


@pytest.fixture(scope="module")
def endpoint(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    key, line = new_key("ann")
    (folder / "keys").write_text(line)
    (folder / "keys").chmod(0o600)
    settings = Settings(
        precision="fp32",
        device="cpu",
        keys=KeySettings(file=str(folder / "keys")),
        front=Policy(requests_per_minute=10**6, burst=10**6, wrong_keys_per_minute=10**6),
        limits=Limits(grace_seconds=PATIENCE, min_bytes_per_s=100_000, grade_bytes=2**20),
        audit=AuditSettings(folder=str(folder / "audit")),
    )
    with scalp_serve(bundle, settings, folder, grpc=True, killed=True) as served:
        endpoint = Endpoint(served.port, served.grpc_port, key, folder / "audit")
        assert endpoint.grade(jpeg(0)).status_code == 200
        yield endpoint
        assert endpoint.grade(jpeg(0)).status_code == 200  # after all of it


@dataclass(frozen=True)
class Reply:
    """What came back on a connection, and whether the other side closed it."""

    raw: bytes
    is_closed: bool

    @property
    def status(self) -> int:
        return int(self.raw.split(b" ", 2)[1])

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode("latin-1").lower()

    @property
    def problem(self) -> tuple[int, str]:
        assert "content-type: application/problem+json" in self.head, self.raw
        return self.status, json.loads(self.raw.partition(b"\r\n\r\n")[2])["code"]


def is_whole(raw: bytes) -> bool:
    """Whether these bytes are a whole answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


def send(
    endpoint: Endpoint, first: bytes, drip: bytes = b"", every: float = 0.1, ends: bool = False
) -> Reply:
    """Sends bytes, and some more now and then, until the other side closes.

    Args:
        ends: The client ends its side when it has a whole answer; the other side would keep the connection.
    """
    until, raw = time.monotonic() + LATE, b""
    with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
        connection.settimeout(every)
        try:
            connection.sendall(first)
            while time.monotonic() < until:
                try:
                    piece = connection.recv(65536)
                    if not piece:
                        return Reply(raw, is_closed=True)
                    raw += piece
                    if ends and is_whole(raw):
                        connection.shutdown(socket.SHUT_WR)
                        drip = b""
                except TimeoutError:
                    connection.sendall(drip)
        except ConnectionError:
            return Reply(raw, is_closed=True)
    return Reply(raw, is_closed=False)


def at_once(
    endpoint: Endpoint, attacks: dict[str, tuple[bytes, bytes]], kept: Sequence[str] = ()
) -> dict[str, Reply]:
    """Replies to attacks at the same time; HAProxy would keep the connections of `kept`."""
    with ThreadPoolExecutor(len(attacks)) as pool:
        waiting = {
            name: pool.submit(send, endpoint, *attack, ends=name in kept) for name, attack in attacks.items()
        }
        return {name: reply.result() for name, reply in waiting.items()}


def test_a_head_that_does_not_end_is_not_waited_for(endpoint):
    half = endpoint.head("GET /healthz")
    replies = at_once(
        endpoint,
        {
            "no byte": (b"", b""),
            "silent": (half, b""),
            "dripping": (half, b"X-A: b\r\n"),
            "dripping, of the second request": (half + b"\r\n" + half, b"X-A: b\r\n"),
            "large": (half + b"X-A: " + bytes(70_000).replace(b"\0", b"a"), b""),
        },
    )
    assert all(reply.is_closed for reply in replies.values()), replies
    # HAProxy's own 400 and 408 are HTML: it sends them before it has a request.
    assert replies["no byte"].status == replies["silent"].status == replies["dripping"].status == 408
    assert replies["dripping, of the second request"].status == 200
    assert replies["dripping, of the second request"].raw.count(b"HTTP/1.1 408 ") == 1
    assert replies["large"].status == 400  # without waiting for its end, which is a 408


def test_a_body_that_does_not_end_is_not_waited_for(endpoint):
    form = "Content-Type: multipart/form-data; boundary=x"
    head = endpoint.head("POST /v1/grade", form, "Content-Length: 1000000") + b"\r\n--x\r\n"
    chunked = endpoint.head("POST /v1/grade", form, "Transfer-Encoding: chunked") + b"\r\n"
    replies = at_once(
        endpoint,
        {
            "silent": (head, b""),
            "dripping": (head, b"a"),
            "chunks dripping": (chunked + b"5\r\n--x\r\n\r\n", b"1\r\na\r\n"),
            "one endless chunk head": (chunked + b"1;", b"a"),
        },
        kept=("silent", "one endless chunk head"),  # see docs/protection.md
    )
    for name, reply in replies.items():
        assert reply.problem == (408, "slow_body"), name
    # What is sent after the answer keeps no connection.
    assert replies["dripping"].is_closed and replies["chunks dripping"].is_closed


def test_a_body_that_breaks_off_leaves_nothing_behind(endpoint):
    head = endpoint.head(
        "POST /v1/grade", "Content-Type: multipart/form-data; boundary=x", "Content-Length: 9000"
    )
    for _ in range(80):  # more than are answered at once
        with socket.create_connection(("127.0.0.1", endpoint.port)) as connection:
            connection.sendall(head + b"\r\n--x\r\n")
    deadline = time.monotonic() + LATE
    while (answer := endpoint.grade(jpeg(0))).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer.status_code == 200


def test_lengths_that_lie_are_refused(endpoint):
    length = "Content-Length: {}".format
    replies = at_once(
        endpoint,
        {
            "more than is allowed": (endpoint.head("POST /v1/grade", length(10**12)) + b"\r\n", b""),
            "two": (endpoint.head("POST /v1/grade", length(3), length(5)) + b"\r\nabcde", b""),
            "both kinds": (
                endpoint.head("POST /v1/grade", length(3), "Transfer-Encoding: chunked") + b"\r\nabc",
                b"",
            ),
            "negative": (endpoint.head("POST /v1/grade", length(-1)) + b"\r\nabc", b""),
            "no number": (endpoint.head("POST /v1/grade", length("many")) + b"\r\nabc", b""),
            "no chunk": (
                endpoint.head("POST /v1/grade", "Transfer-Encoding: chunked") + b"\r\nabcdefgh\r\n",
                b"",
            ),
        },
        kept=("both kinds", "more than is allowed"),
    )
    assert replies.pop("more than is allowed").problem == (413, "too_many_bytes")
    # HAProxy drops the length and passes the chunks on (RFC 9112, 6.3): the body is not a second request.
    both = replies.pop("both kinds")
    assert both.problem == (415, "unsupported_body") and both.raw.count(b"HTTP/1.1 ") == 1
    for name, reply in replies.items():
        assert reply.status == 400, name


def test_a_chunked_body_without_end_is_refused(endpoint):
    form = ("Content-Type: multipart/form-data; boundary=x", "Transfer-Encoding: chunked")
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    head = endpoint.head("POST /v1/grade", *form) + b"\r\n%x\r\n%b\r\n" % (len(part), part)
    reply = send(endpoint, head, b"10000\r\n" + bytes(2**16) + b"\r\n", every=0.02)
    assert reply.problem == (413, "too_many_bytes") and reply.is_closed


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "C:\\private\\a.jpg", "a\0.jpg", "%2e%2e%2fprivate", "private\r\n.jpg"]
)
def test_names_that_look_like_paths_are_no_paths(endpoint, name):
    answer = endpoint.grade(jpeg(1), name)
    assert answer.status_code == 200
    assert "private" not in answer.text and "passwd" not in answer.text


def infer_request(*images: bytes) -> bytes:
    contents = {"bytes_contents": images}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "contents": contents}
    return ModelInferRequest(model_name="scalp", inputs=[tensor]).SerializeToString()


def test_calls_of_grpc_that_no_honest_client_makes_are_refused(endpoint):
    good = infer_request(jpeg(1))
    assert endpoint.infer(good) is StatusCode.OK
    assert endpoint.infer(good, key="a-key-of-nobody-at-all") is StatusCode.UNAUTHENTICATED
    assert endpoint.infer(infer_request(bytes(2**20))) is StatusCode.RESOURCE_EXHAUSTED
    assert endpoint.infer(good[:-9]) is StatusCode.INVALID_ARGUMENT
    assert endpoint.infer(b"\x2a\x00" * 500_000) is StatusCode.INVALID_ARGUMENT
    many = [(f"x-name-{number}", "a value") for number in range(10_000)]
    assert endpoint.infer(good, *many) in (StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE)
    assert endpoint.infer(good) is StatusCode.OK


def test_a_call_of_grpc_is_in_the_audit_log(endpoint):
    assert endpoint.infer(infer_request(jpeg(5)), ("x-request-id", "visit-8")) is StatusCode.OK
    line = audit_line(endpoint, "visit-8")
    assert line["key"] == "ann" and line["model_version"]
    assert (
        endpoint.infer(infer_request(b"a text"), ("x-request-id", "visit-9")) is StatusCode.INVALID_ARGUMENT
    )
    assert audit_line(endpoint, "visit-9")["key"] == "ann"


def audit_line(endpoint: Endpoint, request_id: str) -> dict:
    """The line of the audit log of a request, when it is written."""
    deadline = time.monotonic() + LATE
    while time.monotonic() < deadline:
        text = "".join(file.read_text() for file in endpoint.audit.glob("audit-*"))
        for line in map(json.loads, text.splitlines()):
            if line.get("request_id") == request_id:
                return line
    raise AssertionError(f"no line of {request_id}")


def test_the_audit_log_tells_of_it_and_has_no_names(endpoint):
    sha256 = endpoint.grade(jpeg(2), "private.jpg", **{"X-Request-ID": "visit-7"}).json()["sha256"]
    lines: list[dict] = []
    deadline = time.monotonic() + LATE
    while not any(line.get("request_id") == "visit-7" for line in lines) and time.monotonic() < deadline:
        text = "".join(file.read_text() for file in endpoint.audit.glob("audit-*"))
        lines = [json.loads(line) for line in text.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "visit-7"]
    assert (line["sha256"], line["key"]) == (sha256, "ann") and line["model_version"] and line["ms"] > 0
    assert not any(word in text for word in ("private", "passwd", "127.0.0.1", endpoint.key))


@pytest.mark.parametrize(
    "given", ["a\r\n Set-Cookie: x", "\xff\xfe", "x" * 5000, "<script>alert(1) </script>"]
)
def test_a_request_id_that_is_none_is_not_given_back(endpoint, given):
    reply = send(
        endpoint, endpoint.head("GET /v1/nothing", f"X-Request-ID: {given}", "Connection: close") + b"\r\n"
    )
    assert reply.problem == (404, "not_found")  # HAProxy joins the lines of a folded header
    ids = [line for line in reply.head.splitlines() if line.startswith("x-request-id: ")]
    assert len(ids) == 1 and len(ids[0]) == len("x-request-id: ") + 36
    assert "set-cookie" not in reply.head


def test_uris_of_other_hosts_are_not_fetched(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        host = f"127.0.0.1:{other.getsockname()[1]}"
        for line in (
            f"GET http://{host}/v1/nothing",
            f"GET http://{host}@scalp/v1/nothing",
            f"POST http://{host}/v1/bulk",
            f"CONNECT {host}",
            f"GET //{host}/v1/nothing",
        ):
            reply = send(endpoint, endpoint.head(line, "Connection: close") + b"\r\n")
            assert 400 <= reply.status < 500, line
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.accept()


def test_clients_do_not_steer_ray(endpoint):
    steering = {"X-Request-Timeout-Seconds": "0.0001", "serve_multiplexed_model_id": "x"}
    assert endpoint.grade(jpeg(3), **steering).status_code == 200


def test_there_is_no_websocket(endpoint):
    upgrade = (
        "Connection: Upgrade, close",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    reply = send(endpoint, endpoint.head("GET /v1/nothing", *upgrade) + b"\r\n")
    assert reply.problem == (404, "not_found")


def test_a_bomb_is_not_unpacked(endpoint):
    bomb = io.BytesIO()
    Image.new("1", (50_000, 10_000)).save(bomb, "PNG")
    answer = endpoint.grade(bomb.getvalue())
    assert (answer.status_code, answer.json()["code"]) == (422, "too_many_pixels")


def test_idle_connections_keep_nobody_out(endpoint):
    idle = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(200)]
    try:
        for half in idle[:100]:
            half.sendall(endpoint.head("POST /v1/grade"))
        assert endpoint.grade(jpeg(4)).status_code == 200
        deadline = time.monotonic() + LATE
        for connection in idle:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            while connection.recv(65536):  # until it is closed
                pass
    finally:
        for connection in idle:
            connection.close()
