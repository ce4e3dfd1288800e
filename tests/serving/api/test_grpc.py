"""The gRPC server as `tritonclient` and raw bytes call it, in front of routes with a stub of the model."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc import StatusCode
from starlette.responses import JSONResponse
from tritonclient.grpc import service_pb2

from scalp_core.errors import UserError
from serving import app as serving_app
from serving.api.grpc_calls import HttpAnswer, call_error
from serving.api.grpc_server import GrpcServer, running
from serving.auth.keys import Keys
from serving.http.problems import CODES
from serving.schemas import grpc_messages
from serving.settings import Settings
from tests.serving.api.test_inference import VERSION
from tests.support.grpc_calls import LIMITS, NO_KEYS, SERVICE, Client, infer, serving

BAD = "bad_inference_request"
LONG = "\N{FACE WITH TEARS OF JOY}" * 800


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("grpc")) as client:
        yield client


def photographs(*images: bytes) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object))
    return tensor


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
        (infer(b"a", model_name="a" * 20_000), "unknown_model", "the name or version of the model has more"),
        (infer(b"a", model_version=LONG), "unknown_model", "the name or version of the model has more"),
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
        (infer(b"a", outputs=[{"name": "grade", "parameters": {LONG: {}}}]), BAD, "outputs.0.parameters."),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_refused_with_its_code(client, message, code, details):
    error = client.refused("ModelInfer", message.SerializeToString())
    assert error.details().startswith(f"{code}: {details}"), error.details()
    statuses = {"too_many_photographs": StatusCode.RESOURCE_EXHAUSTED, BAD: StatusCode.INVALID_ARGUMENT}
    statuses["corrupt"] = StatusCode.INVALID_ARGUMENT
    assert error.code() is statuses.get(code, StatusCode.NOT_FOUND)


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
