"""The routes of the Open Inference Protocol as clients call them, with a stub of the model."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from scalp_core.errors import ImageError
from serving.admission.limits import Load
from serving.api.routes import create_api
from serving.http.tensors import HEADER_LENGTH
from serving.replicas.ingress import replica
from serving.schemas.grading import GradeResponse, ModelResponse
from serving.settings import Settings

KEY = "a-key-of-ann-that-is-long-enough"
INFER = "/v2/models/scalp/infer"
VERSION = "run-1"


class Model:
    """Stub of the ingress, whose grade of an image is its length."""

    bulk = None
    ready = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.graded: list[bytes] = []

    async def grade_together(
        self, images: list[bytes], _version: str | None
    ) -> tuple[list[GradeResponse], int]:
        if b"broken" in images:
            raise ImageError("corrupt", "image 1: it is damaged")
        self.graded += images
        return [
            GradeResponse.model_construct(
                grade=len(data) % 4, probabilities=[0.1, 0.2, 0.3, 0.4], grade_set=[1, 2],
                refer=len(data) > 1, model_version=VERSION,
            )
            for data in images
        ], 7  # fmt: skip

    async def describe(self) -> ModelResponse:
        return ModelResponse.model_construct(model_version=VERSION)

    async def is_ready(self) -> bool:
        return self.ready


class Endpoint:
    """The application of a replica."""

    def __init__(self, **settings: Any) -> None:
        all_settings = Settings(**settings)
        self.model = Model(all_settings)
        self.api = create_api(all_settings, Load(all_settings.limits), None)
        self.api.dependency_overrides[replica] = lambda: self.model

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def infer(self, request: Any, binary: bytes = b"", path: str = INFER) -> httpx.Response:
        head = json.dumps(request).encode()
        headers = {HEADER_LENGTH: str(len(head))} if binary else {}
        return self.ask("POST", path, content=head + binary, headers=headers)


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


def in_json(*images: bytes, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(image).decode() for image in images]
    return {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data} | changes


def elements(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def in_binary(size: int, count: int = 1) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"name": "image", "datatype": "BYTES", "shape": [count], "parameters": parameters}


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def error_of(answer: httpx.Response, status: int) -> str:
    assert answer.headers["content-type"] == "application/json"
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_images_in_json_are_graded_in_order_and_answered_in_json(endpoint):
    answer = endpoint.infer({"id": "visit-7", "inputs": [in_json(b"a", b"bc")], "unknown": {"x": [1]}})
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("scalp", VERSION, "visit-7")
    assert endpoint.model.graded == [b"a", b"bc"]
    outputs = {
        output["name"]: (output["datatype"], output["shape"], output["data"]) for output in body["outputs"]
    }
    assert outputs == {
        "grade": ("INT32", [2], [1, 2]),
        "probabilities": ("FP64", [2, 4], [0.1, 0.2, 0.3, 0.4] * 2),
        "grade_set": ("BOOL", [2, 4], [False, True, True, False] * 2),
        "refer": ("BOOL", [2], [False, True]),
    }
    assert answer.headers["x-batch-size"] == "7"


def test_binary_tensor_data_in_and_out(endpoint):
    binary = elements(b"a", b"", b"abc")
    request = {
        "inputs": [in_binary(len(binary), 3)],
        "outputs": [{"name": "refer"}, {"name": "grade", "parameters": {"binary_data": True}}],
        "parameters": {"binary_data_output": False},
    }
    answer = endpoint.infer(request, binary)
    size = int(answer.headers[HEADER_LENGTH])
    refer, grade = json.loads(answer.content[:size])["outputs"]
    assert answer.headers["content-type"] == "application/octet-stream"
    assert (refer["data"], grade["parameters"]) == ([False, False, True], {"binary_data_size": 12})
    assert np.frombuffer(answer.content[size:], "<i4").tolist() == [1, 0, 3]
    assert endpoint.model.graded == [b"a", b"", b"abc"]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("request_", "binary", "expected"),
    [
        ({"inputs": [in_json(b"a", datatype="FP32")]}, b"", "inputs.0.datatype: Input should be 'BYTES'"),
        ({"inputs": [in_json(b"a", name="pixels")]}, b"", "inputs.0.name: Input should be 'image'"),
        ({"inputs": [in_json(b"a", shape=[2])]}, b"", "the shape is [2], but data has 1 elements"),
        ({"inputs": [in_json(b"a", shape=[1, 1])]}, b"", "inputs.0.shape: List should have at most 1 item"),
        ({"inputs": [in_json(shape=[0])]}, b"", "the shape is [0]"),
        ({"inputs": [in_json(b"a", shape=["1"])]}, b"", "inputs.0.shape.0: Input should be a valid integer"),
        ({"inputs": [in_json(b"a", data=["a photo"])]}, b"", "data[0] is not the base64 of an image file"),
        ({"inputs": [in_json(b"a", data=["Kopfhäute"])]}, b"", "data[0] is not the base64"),
        ({"inputs": [in_json(b"a")] * 2}, b"", "inputs: List should have at most 1 item"),
        ({"inputs": []}, b"", "inputs: List should have at least 1 item"),
        ({}, b"", "inputs: Field required"),
        ([], b"", "Input should be an object"),
        ({"inputs": [in_json(b"a", data=None)]}, b"", "either data or the parameter binary_data_size"),
        ({"inputs": [in_json(b"a")], "outputs": [{"name": "heatmap"}]}, b"", "outputs.0.name: Input"),
        (
            {"inputs": [in_json(b"a")], "outputs": [{"name": "grade", "parameters": {"classification": 2}}]},
            b"",
            "outputs.0.parameters.classification: Extra inputs are not permitted",
        ),
        ({"inputs": [in_json(b"a")]}, b"more", "binary_data_size is 0, but 4 bytes follow the JSON"),
        ({"inputs": [in_binary(9)]}, elements(b"a"), "binary_data_size is 9, but 5 bytes follow the JSON"),
        ({"inputs": [in_binary(5, 2)]}, elements(b"a"), "image 1 ends after the binary data"),
        ({"inputs": [in_binary(10)]}, elements(b"a", b"b"), "5 bytes follow the last image"),
        ({"inputs": [in_binary(4)]}, b"\xff\xff\xff\xff", "image 0 ends after the binary data"),
        ({"inputs": [in_binary(3)]}, b"\0\0\0", "image 0 ends after the binary data"),
        ({"inputs": nested(500)}, b"", "Invalid JSON"),
        ({"inputs": [in_json(b"a")], "parameters": {"x": [""] * 5000}}, b"", "more than 4,096 values"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_follow_the_protocol_is_refused_with_the_reason(
    endpoint, request_, binary, expected
):
    assert expected in error_of(endpoint.infer(request_, binary), 400)
    assert endpoint.model.graded == []


def test_a_length_of_the_json_that_is_wrong_is_refused(endpoint):
    body = json.dumps({"inputs": [in_json(b"a")]})
    for length, status, expected in (
        (len(body) + 1, 400, f"is {len(body) + 1}, but the body has {len(body)} bytes"),
        (len(body) - 1, 400, "Invalid JSON"),
        ("0", 422, "greater than or equal to 1"),
        ("two", 422, "valid integer"),
    ):
        headers = {HEADER_LENGTH: str(length)}
        assert expected in error_of(endpoint.ask("POST", INFER, content=body, headers=headers), status)
    compressed = endpoint.ask("POST", INFER, content=body, headers={"Content-Encoding": "gzip"})
    assert "uncompressed" in error_of(compressed, 415)


def test_images_have_the_limits_of_a_replica():
    endpoint = Endpoint(limits={"infer_images": 2, "grade_bytes": 1000})
    assert endpoint.infer({"inputs": [in_json(b"a", b"b")]}).status_code == 200
    assert "3 images; the limit is 2" in error_of(
        endpoint.infer({"inputs": [in_json(b"a", b"b", b"c")]}), 413
    )
    assert "the limit is 2" in error_of(endpoint.infer({"inputs": [in_binary(4, 2**40)]}, b"\0" * 4), 413)
    assert "1,000 bytes" in error_of(endpoint.infer({"inputs": [in_json(b"a" * 2000)]}), 413)


def test_an_image_that_cannot_be_graded_refuses_the_request(endpoint):
    assert error_of(endpoint.infer({"inputs": [in_json(b"a", b"broken")]}), 422) == "image 1: it is damaged"


def test_metadata_and_readiness(endpoint):
    def body(path: str) -> Any:
        answer = endpoint.ask("GET", path)
        assert answer.status_code == 200
        return answer.json()

    assert body("/v2") == {"name": "scalp", "version": "1", "extensions": ["binary_tensor_data"]}
    assert body("/v2/health/live") == {"live": True} and body("/v2/health/ready") == {"ready": True}
    model = body("/v2/models/scalp")
    assert model == body(f"/v2/models/scalp/versions/{VERSION}")
    assert (model["name"], model["versions"]) == ("scalp", [VERSION])
    assert model["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [output["shape"] for output in model["outputs"]] == [[-1], [-1, 4], [-1, 4], [-1]]
    for path in ("/v2/models/scalp/ready", f"/v2/models/scalp/versions/{VERSION}/ready"):
        assert body(path) == {"name": "scalp", "ready": True}
    endpoint.model.ready = False
    for path in ("/v2/health/ready", "/v2/models/scalp/ready"):
        assert "does not answer yet" in error_of(endpoint.ask("GET", path), 503)


def test_another_model_version_or_path_is_not_found(endpoint):
    for path in ("/v2/models/other", "/v2/models/scalp/versions/2", "/v2/models/scalp/versions/2/ready",
                 "/v2/models/other/ready", "/v2/nothing"):  # fmt: skip
        error_of(endpoint.ask("GET", path), 404)
    for path in ("/v2/models/other/infer", "/v2/models/scalp/versions/2/infer"):
        error_of(endpoint.infer({"inputs": [in_json(b"a")]}, path=path), 404)
    assert endpoint.model.graded == []
    versioned = f"/v2/models/scalp/versions/{VERSION}/infer"
    assert endpoint.infer({"inputs": [in_json(b"a")]}, path=versioned).status_code == 200


def test_models_need_a_key_and_probes_do_not(monkeypatch):
    monkeypatch.setenv("SCALP_KEYS", f"ann: {KEY} scope=bulk:s3://bucket\nbo: {KEY}-2 scope=grade")
    endpoint = Endpoint()
    for path in ("/v2/models/scalp", "/v2/models/scalp/ready"):
        assert "key is missing" in error_of(endpoint.ask("GET", path), 401)
        of_bulk = endpoint.ask("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        assert "lacks the scope grade" in error_of(of_bulk, 403)
        of_grade = endpoint.ask("GET", path, headers={"Authorization": f"Bearer {KEY}-2"})
        assert of_grade.status_code == 200
    assert "key is missing" in error_of(endpoint.infer({"inputs": [in_json(b"a")]}), 401)
    for path in ("/v2", "/v2/health/live", "/v2/health/ready"):
        assert endpoint.ask("GET", path).status_code == 200
    assert endpoint.model.graded == []
