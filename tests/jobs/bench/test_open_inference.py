"""Requests to servers of the Open Inference Protocol are such as the protocol wants."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from jobs.bench import open_inference
from scalp_core.errors import UserError
from serving.http.tensors import HEADER_LENGTH, read_infer_request

FILES = [b"photograph", b"\xff" * 12_345]
KEY = "a-key-of-the-clinic"
PHOTOGRAPHS = {"name": "image", "datatype": "BYTES", "shape": [-1]}


@pytest.fixture
def server(monkeypatch):
    """`server(extensions, inputs)` describes a server whose model is called faces."""

    def describe(extensions: list[str], inputs: list[dict[str, Any]]) -> None:
        answers = {"/v2": {"extensions": extensions}, "/v2/models/faces": {"inputs": inputs}}

        def get(url: str, headers: dict[str, str], **_: Any) -> httpx.Response:
            assert headers == {"Authorization": f"Bearer {KEY}"}
            answer = answers.get(httpx.URL(url).path)
            return httpx.Response(200, json=answer) if answer else httpx.Response(404, text="no such model")

        monkeypatch.setattr(open_inference.httpx, "get", get)

    return describe


@pytest.mark.parametrize("extensions", [["binary_tensor_data"], []], ids=["binary", "json"])
def test_a_request_has_one_image_of_the_files(server, extensions):
    server(extensions, [PHOTOGRAPHS])
    path, headers, bodies = open_inference.make_requests("http://a:1/", "faces", FILES, KEY)
    assert (path, headers["Authorization"]) == ("/v2/models/faces/infer", f"Bearer {KEY}")
    assert (HEADER_LENGTH in headers) == bool(extensions)
    length = int(headers[HEADER_LENGTH]) if extensions else None
    assert [read_infer_request([body], length, 1)[1] for body in bodies] == [[data] for data in FILES]


def test_a_model_of_another_input_and_another_server_are_refused(server):
    server([], [PHOTOGRAPHS, {"name": "mask", "datatype": "FP32", "shape": [1]}])
    with pytest.raises(UserError, match="the model faces has image BYTES, mask FP32"):
        open_inference.make_requests("http://a:1", "faces", FILES, KEY)
    with pytest.raises(UserError, match="answers 404: no such model; --protocol oip needs"):
        open_inference.make_requests("http://a:1", "hands", FILES, KEY)
