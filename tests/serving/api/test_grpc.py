"""The gRPC server as `tritonclient` and raw bytes call it, in front of routes with a stub of the model."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import uvicorn
from grpc import StatusCode
from starlette.requests import Request
from starlette.responses import JSONResponse
from tritonclient.grpc import service_pb2

from scalp_core.errors import UserError
from serving import app as serving_app
from serving.admission.limits import Limits
from serving.api.grpc_calls import HttpAnswer, call_error
from serving.api.grpc_server import GrpcServer, running
from serving.auth.keys import Keys, KeySettings
from serving.http.problems import CODES
from serving.schemas import grpc_messages
from serving.settings import Settings
from tests.serving.api.test_inference import KEY, VERSION, Endpoint

LIMITS = Limits(grade_bytes=2**20, held_bytes=2**21)
BAD = "bad_inference_request"
NO_KEYS = KeySettings()
SERVICE = f"/{grpc_messages.SERVICE}/"


class Client:
    """Clients of one server, and the requests that it sent."""

    def __init__(self, address: str, sent: list[Request]) -> None:
        self.address = address
        self.sent = sent

    @contextmanager
    def triton(self) -> Iterator[triton.InferenceServerClient]:
        with triton.InferenceServerClient(self.address) as client:
            yield client

    def call(self, method: str, message: bytes, *metadata: tuple[str, str], **options: Any) -> bytes:
        with grpc.insecure_channel(self.address) as channel:
            return channel.unary_unary(SERVICE + method)(message, metadata=metadata, timeout=60, **options)

    def refused(
        self, method: str, message: bytes, *metadata: tuple[str, str], **options: Any
    ) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as raised:
            self.call(method, message, *metadata, **options)
        return raised.value


class Requests:
    """ASGI application that notes the requests, and answers by `app`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sent: list[Request] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await request.body()
        self.sent.append(request)
        messages = [{"type": "http.request", "body": await request.body(), "more_body": False}]

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)


@contextmanager
def serving(
    folder: Path, limits: Limits = LIMITS, keys: KeySettings = NO_KEYS, app: Any = None
) -> Iterator[Client]:
    """Run the server in front of the routes, or of another application."""
    requests = Requests(app or Endpoint(limits=limits, keys=keys).api)
    config = uvicorn.Config(requests, uds=str(folder / "http.sock"), lifespan="off", log_level="error")
    endpoint = uvicorn.Server(config)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "http.sock"))
        listener.listen()
        thread = threading.Thread(target=endpoint.run, args=([listener],))
        thread.start()
        try:
            address = f"unix:{folder}/grpc.sock"
            with running(GrpcServer(limits, Keys(keys), 30, str(folder / "http.sock")), address):
                yield Client(address, requests.sent)
        finally:
            endpoint.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("grpc")) as client:
        yield client


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(
        f"ann: {KEY}\nbob: {KEY}-of-bob scope=bulk:/data\ncy: {KEY}-of-cy expires=2020-01-01"
    )
    (folder / "keys").chmod(0o600)
    with serving(folder, keys=KeySettings(file=str(folder / "keys"))) as client:
        yield client


def photographs(*images: bytes) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object))
    return tensor


def infer(*images: bytes, **changes: Any) -> service_pb2.ModelInferRequest:
    """A request with its images as elements, not as raw data."""
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "contents": {"bytes_contents": images},
    }
    fields = {"model_name": "scalp", "inputs": [tensor | changes.pop("tensor", {})], **changes}
    return service_pb2.ModelInferRequest(**fields)


def test_the_messages_are_those_of_triton():
    """Each field has the number, type and name of Triton's, which has more messages and fields."""
    for method in (
        grpc_messages.message_class("ServerLiveRequest")
        .DESCRIPTOR.file.services_by_name["GRPCInferenceService"]
        .methods
    ):
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method.name]
        for our_type, their_type in (
            (method.input_type, theirs.input_type),
            (method.output_type, theirs.output_type),
        ):
            compare(our_type, their_type)


def compare(ours: Any, theirs: Any) -> None:
    assert ours.full_name == theirs.full_name
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
        if field.message_type:
            compare(field.message_type, other.message_type)


def test_the_compiled_messages_are_those_of_the_proto_file():
    file = grpc_messages.message_class("ServerLiveRequest").DESCRIPTOR.file
    lines = Path(grpc_messages.__file__).with_name("open_inference.proto").read_text().splitlines()
    declared = [
        line.strip().removesuffix(";").split()[-3::2] for line in lines if line.strip()[-2:-1].isdigit()
    ]
    messages = [*file.message_types_by_name.values()]
    messages += [
        inner for message in messages for inner in message.nested_types if not inner.GetOptions().map_entry
    ]
    compiled = [[field.name, str(field.number)] for message in messages for field in message.fields]
    assert sorted(declared) == sorted(compiled) and len(compiled) > 40


def test_a_client_finds_the_model_and_gets_its_outputs(client):
    with client.triton() as model:
        assert model.is_server_live() and model.is_server_ready()
        assert model.is_model_ready("scalp") and model.is_model_ready("scalp", VERSION)
        assert model.get_server_metadata().extensions == ["binary_tensor_data"]
        metadata = model.get_model_metadata("scalp", as_json=True)
        assert metadata["versions"] == [VERSION]
        assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": ["-1"]}]
        result = model.infer(
            "scalp", [photographs(b"a", b"bc")], request_id="visit-7", headers={"x-request-id": "9"}
        )
        assert result.get_response().id == "visit-7" and result.get_response().model_version == VERSION
        assert result.as_numpy("grade").tolist() == [1, 2]
        assert result.as_numpy("probabilities").tolist() == [[0.1, 0.2, 0.3, 0.4]] * 2
        assert result.as_numpy("grade_set").tolist() == [[False, True, True, False]] * 2
        outputs = [triton.InferRequestedOutput("refer")]
        result = model.infer("scalp", [photographs(b"a", b"bc")], model_version=VERSION, outputs=outputs)
        assert result.as_numpy("refer").tolist() == [False, True] and result.as_numpy("grade") is None


def test_images_may_be_elements_of_the_tensor(client):
    answer = service_pb2.ModelInferResponse.FromString(
        client.call("ModelInfer", infer(b"a", b"", b"abc").SerializeToString())
    )
    assert np.frombuffer(answer.raw_output_contents[0], "<i4").tolist() == [1, 0, 3]


def test_a_call_carries_the_headers_of_a_request(client):
    with grpc.insecure_channel(client.address) as channel:
        metadata = [
            ("x-request-id", "visit-7"),
            ("traceparent", "00-1-2-01"),
            ("x-forwarded-for", "127.0.0.1"),
        ]
        metadata += [("cookie", "c"), ("host", "h")]
        message = infer(b"a").SerializeToString()
        _, call = channel.unary_unary(f"{SERVICE}ModelInfer").with_call(message, metadata=metadata)
        trailers = dict(call.trailing_metadata())
    headers = client.sent[-1].headers
    assert (headers["x-request-id"], headers["traceparent"]) == ("visit-7", "00-1-2-01")
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["host"] == "localhost" and "cookie" not in headers
    assert trailers["x-batch-size"] == "7"


@pytest.mark.parametrize(
    ("message", "code", "details"),
    [
        (infer(b"broken"), "corrupt", "image 1: it is damaged"),
        (infer(b"a", model_name="resnet"), "unknown_model", "there is no model"),
        (infer(b"a", model_name=".."), "unknown_model", "there is no model"),
        (infer(b"a", model_version="7"), "unknown_model", "scalp has no such version"),
        (infer(b"a", model_version="../../grade?"), "not_found", "the path"),
        (infer(*[b"a"] * 33), "too_many_photographs", "33 images; the limit is 32"),
        (infer(b"a", tensor={"datatype": "FP32"}), BAD, "inputs.0.datatype"),
        (infer(b"a", tensor={"shape": [2]}), BAD, "image 1 ends after"),
        (infer(b"a", tensor={"shape": [2**62]}), "too_many_photographs", ""),
        (infer(b"a", tensor={"shape": [-1]}), BAD, "the shape is [-1]"),
        (infer(tensor={"shape": [1]}), BAD, "image 0 ends after"),
        (infer(b"a", inputs=[]), BAD, "inputs: List should have"),
        (infer(b"a", inputs=[{}, {}]), BAD, "inputs: List should have"),
        (infer(b"a", raw_input_contents=[b"", b""]), BAD, "raw_input_contents has 2 tensors"),
        (infer(b"a", raw_input_contents=[b"\xff\xff\xff\xffa"]), BAD, "image 0 ends after"),
        (infer(b"a", raw_input_contents=[b"\x01\0\0\0ab"]), BAD, "1 bytes follow"),
        (infer(b"a", outputs=[{"name": "score"}]), BAD, "outputs.0.name"),
        (
            infer(b"a", outputs=[{"name": "grade", "parameters": {"classification": {"int64_param": 3}}}]),
            BAD,
            "outputs.0.parameters.classification",
        ),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_refused_with_its_code(client, message, code, details):
    error = client.refused("ModelInfer", message.SerializeToString())
    assert error.details().startswith(f"{code}: {details}"), error.details()
    statuses = {"too_many_photographs": StatusCode.RESOURCE_EXHAUSTED, BAD: StatusCode.INVALID_ARGUMENT}
    statuses["corrupt"] = StatusCode.INVALID_ARGUMENT
    assert error.code() is statuses.get(code, StatusCode.NOT_FOUND)


def field(number: int, *content: bytes) -> bytes:
    """A field with a length, of the message with these bytes."""
    data, size = b"".join(content), b""
    left = len(data)
    while left > 127:
        size, left = size + bytes([left & 127 | 128]), left >> 7
    return bytes([number << 3 | 2]) + size + bytes([left]) + data


@pytest.mark.parametrize(
    ("message", "details"),
    [
        (b"\xff" * 20, "the message is damaged"),
        (b"\x2a\x05a", "the message is damaged"),  # ends within a field
        (b"\x08", "the message is damaged"),
        (b"\x0b\x0c", "the message is damaged"),  # a group
        (b"\x0a\x01\xff", "the message is damaged"),  # a name that is not UTF-8
        (b"\x2a\x00" * 400_000, "the message has more than 65,536 bytes in addition to images"),
        (field(5, b"\x2a\x00" * 400_000), "the message has more than 65,536 bytes"),
        (field(5, field(5, field(2, b"\x01" * 10**6))), "the message has more than 65,536 bytes"),  # integers
        (field(5, field(5, b"\x42\x00" * 400_000)), "the message has more than 65,536 bytes"),  # empty images
        (b"\x3a\x00" * 400_000, "the message has more than 65,536 bytes"),  # empty tensors
        (field(4, b"a" * 70_000), "the message has more than 65,536 bytes"),
        (field(15, b"a" * 70_000), "the message has more than 65,536 bytes"),  # an unknown field
    ],
)  # fmt: skip
def test_a_message_that_would_take_much_memory_is_not_parsed(client, message, details, monkeypatch):
    error = client.refused("ModelInfer", message)
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"bad_inference_request: {details}"), error.details()


def test_a_large_image_is_counted_as_an_image(client):
    for message in (
        infer(b"a" * 900_000),
        infer(b"", raw_input_contents=[(900_000).to_bytes(4, "little") + b"a" * 900_000]),
    ):
        client.call("ModelInfer", message.SerializeToString())


def test_a_refused_message_leaves_the_memory_with_its_call(client):
    """Without the garbage collector, which large messages do not wake."""
    message = infer(b"broken", tensor={"shape": [9]}, raw_input_contents=[bytes(900_000)]).SerializeToString()
    client.refused("ModelInfer", message)
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(8):
            client.refused("ModelInfer", message)
            client.sent.clear()
        assert tracemalloc.get_traced_memory()[0] < 4 * len(message)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_message_beyond_the_limit_is_refused(client):
    error = client.refused("ModelInfer", infer(b"a" * LIMITS.grade_bytes).SerializeToString())
    assert error.code() is StatusCode.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_refused(client):
    count = len(client.sent)
    message = infer(b"a" * 900_000).SerializeToString()
    error = client.refused("ModelInfer", message, compression=grpc.Compression.Gzip)
    assert error.code() is StatusCode.UNIMPLEMENTED and len(client.sent) == count


def test_a_key_is_checked_before_the_message_is_received(with_keys):
    message = infer(b"a").SerializeToString()
    for key, status, code in (
        (None, StatusCode.UNAUTHENTICATED, "no_key"),
        ("not-a-key-of-this-endpoint", StatusCode.UNAUTHENTICATED, "wrong_key"),
        (f"{KEY}-of-cy", StatusCode.UNAUTHENTICATED, "expired_key"),
        (f"{KEY}-of-bob", StatusCode.PERMISSION_DENIED, "forbidden"),
    ):
        metadata = [("authorization", f"Bearer {key}")] if key else []
        for method in ("ModelInfer", "ModelReady", "ModelMetadata"):
            error = with_keys.refused(
                method, message if method == "ModelInfer" else b"\x0a\x05scalp", *metadata
            )
            assert (error.code(), error.details().partition(": ")[0]) == (status, code)
            assert with_keys.sent[-1].method == "GET" or status is StatusCode.PERMISSION_DENIED
    with_keys.call("ModelInfer", message, ("authorization", f"Bearer {KEY}"))
    assert with_keys.sent[-1].url.path == "/v2/models/scalp/infer"
    assert with_keys.call("ServerReady", b"") == b"\x08\x01"  # needs no key


def test_without_a_key_a_message_is_not_waited_for(with_keys):
    """The refusal comes although the client sends no message."""
    with grpc.insecure_channel(with_keys.address) as channel:
        silent, end = threading.Event(), iter([])

        def nothing() -> Iterator[bytes]:
            silent.wait()
            yield from end

        try:
            with pytest.raises(grpc.RpcError) as raised:
                channel.stream_unary(f"{SERVICE}ModelInfer")(nothing(), timeout=60)
        finally:
            silent.set()
    assert raised.value.code() is StatusCode.UNAUTHENTICATED


def test_a_message_that_does_not_come_is_given_up(tmp_path):
    limits = LIMITS.model_copy(update={"grade_seconds": 0.01})
    silent = threading.Event()
    with serving(tmp_path, limits) as client, grpc.insecure_channel(client.address) as channel:

        def nothing() -> Iterator[bytes]:
            silent.wait()
            yield from ()

        call = channel.stream_unary(f"{SERVICE}ModelInfer").future(nothing(), timeout=60)
        assert call.exception().code() is StatusCode.DEADLINE_EXCEEDED
        assert call.details().startswith("slow_body: ")
        silent.set()


def test_a_call_without_a_message_is_refused(client):
    with grpc.insecure_channel(client.address) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.stream_unary(f"{SERVICE}ModelInfer")(iter([]), timeout=60)
    assert raised.value.code() is StatusCode.INVALID_ARGUMENT


def test_messages_beyond_the_memory_are_refused_and_small_ones_received(tmp_path):
    """HAProxy reports the length of a message, and a call holds as much while its message comes."""
    with serving(tmp_path) as client, grpc.insecure_channel(client.address) as channel:
        silent, message = threading.Event(), infer(b"a").SerializeToString()

        def late() -> Iterator[bytes]:
            silent.wait()
            yield message

        method = channel.stream_unary(f"{SERVICE}ModelInfer")
        most = [("x-message-bytes", f"{LIMITS.grade_bytes - 1000:08X}")]
        held = [method.future(late(), metadata=most, timeout=60) for _ in range(2)]
        refused = None
        while refused is None:  # until both are held
            with suppress(pytest.fail.Exception):
                refused = client.refused("ModelInfer", message, *most)
        assert refused.code() is StatusCode.UNAVAILABLE and refused.details().startswith("overloaded: ")
        assert ("retry-after", "1") in [tuple(pair) for pair in refused.trailing_metadata()]
        client.call("ModelInfer", message, ("x-message-bytes", "000003E8"))
        silent.set()
        assert all(call.result() for call in held)
        client.call("ModelInfer", message, *most)


@pytest.mark.parametrize("code", [*CODES, "not_an_image", "corrupt"])
def test_each_problem_has_a_status(code):
    known = CODES.get(code)
    later = {"Retry-After": "3"}
    for http_status in known.statuses if known else (415, 422):
        for headers, body in (
            ({"X-Problem-Code": code, **later}, {"error": "why"}),
            (later, {"detail": "why", "error": "why", "code": code}),  # of HAProxy
        ):
            answer = HttpAnswer(http_status, httpx.Headers(headers), json.dumps(body).encode())
            error = call_error(answer)
            assert error.details == f"{code}: why" and ("retry-after", "3") in error.trailers
            assert error.status is {
                401: StatusCode.UNAUTHENTICATED, 403: StatusCode.PERMISSION_DENIED, 404: StatusCode.NOT_FOUND,
                408: StatusCode.DEADLINE_EXCEEDED, 413: StatusCode.RESOURCE_EXHAUSTED,
                429: StatusCode.RESOURCE_EXHAUSTED, 500: StatusCode.INTERNAL, 502: StatusCode.UNAVAILABLE,
                503: StatusCode.UNAVAILABLE, 504: StatusCode.DEADLINE_EXCEEDED,
            }.get(http_status, StatusCode.INVALID_ARGUMENT)  # fmt: skip


def test_an_endpoint_that_does_not_answer_is_not_ready(tmp_path):
    address = f"unix:{tmp_path}/grpc.sock"
    with running(GrpcServer(LIMITS, Keys(NO_KEYS), 30, str(tmp_path / "http.sock")), address):
        client = Client(address, [])
        assert client.call("ServerReady", b"") == client.call("ServerLive", b"") == b""  # false
        error = client.refused("ModelInfer", infer(b"a").SerializeToString())
    assert error.code() is StatusCode.UNAVAILABLE and error.details().startswith("not_ready: ")


def test_a_rate_limit_tells_when_to_try_again(tmp_path):
    problem = {"code": "too_many_requests", "detail": "wait 1 s", "error": "wait 1 s"}

    answer = JSONResponse(problem, 429, {"retry-after": "1"})
    with serving(tmp_path, app=answer) as client:
        for method, message in (("ModelInfer", infer(b"a").SerializeToString()), ("ServerReady", b"")):
            error = client.refused(method, message)
            assert error.code() is StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "too_many_requests: wait 1 s"
            assert ("retry-after", "1") in [tuple(pair) for pair in error.trailing_metadata()]


def test_the_end_of_a_call_ends_its_request(tmp_path):
    ended, begun = threading.Event(), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    with serving(tmp_path, app=app) as client, grpc.insecure_channel(client.address) as channel:
        call = channel.unary_unary(f"{SERVICE}ModelInfer").future(infer(b"a").SerializeToString())
        assert begun.wait(60)
        call.cancel()
        assert ended.wait(60)


def test_a_server_that_fails_ends_its_thread(caplog):
    class Failing(GrpcServer):
        """Without a server of gRPC, whose threads would outlive the failure in this process."""

        def create(self) -> Any:
            asyncio.get_running_loop().call_later(0.1, sys.exit, 1)
            return AsyncMock(add_insecure_port=Mock())

        async def close(self) -> None:
            pass

    with running(Failing(LIMITS, Keys(NO_KEYS), 30, ""), "unix:") as thread:
        thread.join(60)
        assert not thread.is_alive()
    assert "the gRPC server has failed" in caplog.text


def test_an_endpoint_ends_if_its_grpc_server_has_failed(monkeypatch):
    failed, ended = threading.Thread(target=int), []
    failed.start()
    monkeypatch.setattr(serving_app, "start", lambda *_: None)
    monkeypatch.setattr(serving_app, "_grpc_server", lambda *_: nullcontext(failed))
    monkeypatch.setattr(serving_app, "_drain", lambda: ended.append("drained"))
    monkeypatch.setattr(serving_app, "stop", lambda: None)
    monkeypatch.setattr(serving_app.signal, "signal", lambda *_: None)
    with pytest.raises(UserError, match="the gRPC server has failed; start the endpoint again"):
        serving_app.serve("bundle", "127.0.0.1", 8000, Settings(), grpc_port=8001)
    assert ended == ["drained"]


def test_an_address_that_is_not_available_is_reported(tmp_path):
    server = GrpcServer(LIMITS, Keys(NO_KEYS), 30, str(tmp_path / "http.sock"))
    with pytest.raises(RuntimeError), running(server, f"unix:{tmp_path}/missing/grpc.sock"):
        pass
