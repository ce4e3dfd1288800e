"""The Open Inference Protocol as its clients speak it: the real `tritonclient` and a real endpoint."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from jobs.bench import inputs
from jobs.bench.serve import bench_serve
from scalp_core.errors import UserError
from tests.support.images import jpeg

IMAGES = [jpeg(seed) for seed in range(3)]
OUTPUTS = ("grade", "probabilities", "grade_set", "refer")


@pytest.fixture(scope="module")
def truth(endpoint):
    """Answers of `/v1/grade`."""
    with httpx.Client(base_url=endpoint.origin, timeout=60) as client:
        return [client.post("/v1/grade", files={"file": data}).raise_for_status().json() for data in IMAGES]


@pytest.fixture
def client(endpoint):
    client = triton.InferenceServerClient(f"127.0.0.1:{endpoint.port}", network_timeout=60)
    yield client
    client.close()


@pytest.fixture
def grpc_client(endpoint):
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{endpoint.grpc_port}") as client:
        yield client


def photographs(images: list[bytes], module=triton) -> triton.InferInput | triton_grpc.InferInput:
    tensor = module.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object))
    return tensor


def check(result: triton.InferResult | triton_grpc.InferResult, truth: list[dict]) -> None:
    """The answers are those of `/v1/grade`, to the last bit."""
    assert result.as_numpy("grade").tolist() == [answer["grade"] for answer in truth]
    assert result.as_numpy("probabilities").tolist() == [answer["probabilities"] for answer in truth]
    assert result.as_numpy("refer").tolist() == [answer["refer"] for answer in truth]
    sets = [np.flatnonzero(row).tolist() for row in result.as_numpy("grade_set")]
    assert sets == [answer["grade_set"] for answer in truth]
    response = result.get_response()
    is_http = isinstance(response, dict)
    version = response["model_version"] if is_http else response.model_version
    assert version == truth[0]["model_version"]


def test_a_client_finds_the_model_and_grades_as_the_endpoint_does(client, truth):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("scalp")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("scalp")
    assert metadata["versions"] == [truth[0]["model_version"]]
    assert tuple(output["name"] for output in metadata["outputs"]) == OUTPUTS
    check(client.infer("scalp", [photographs(IMAGES)]), truth)
    for binary in (True, False):
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
        for data, answer in zip(IMAGES, truth, strict=True):
            result = client.infer("scalp", [photographs([data])], outputs=wanted, request_id="visit-7")
            check(result, [answer])
            assert result.get_response()["id"] == "visit-7"
    (version,) = metadata["versions"]
    assert client.is_model_ready("scalp", version)
    check(client.infer("scalp", [photographs(IMAGES)], model_version=version), truth)


def test_a_client_without_the_binary_extension_sends_base64(endpoint, truth):
    data = [base64.b64encode(image).decode() for image in IMAGES]
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}]
    answer = httpx.post(f"{endpoint.origin}/v2/models/scalp/infer", json={"inputs": inputs}, timeout=60)
    size = len(answer.content)
    check(triton.InferenceServerClient.parse_response_body(answer.content), truth)
    assert int(answer.headers["content-length"]) == size and "inference" not in str(answer.headers).lower()


def test_the_load_generator_of_any_server_of_the_protocol_loads_this_one(endpoint, tmp_path):
    for number in range(inputs.MIN_IMAGES):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    images, out = str(tmp_path), str(tmp_path / "out")
    summary = bench_serve(out, endpoint.origin, images, clients=2, seconds=1, protocol="oip")
    (row,) = summary["rows"]
    assert row["errors"] == 0 < row["requests_per_second"] and row["batch_fill"] >= 1
    with pytest.raises(UserError, match="answers 404: .*no model of this name"):
        bench_serve(out, endpoint.origin, images, protocol="oip", model="resnet")


def test_a_client_is_told_why(client):
    for images, status, message in (
        ([b"a text"], "415", "not one of JPEG"),
        ([IMAGES[0], IMAGES[1][:3000]], "422", "image 1: "),
        (IMAGES * 11, "413", "33 images; the limit is 32"),
    ):
        with pytest.raises(InferenceServerException, match=message) as raised:
            client.infer("scalp", [photographs(images)])
        assert raised.value.status() == status
    with pytest.raises(InferenceServerException, match="no model of this name"):
        client.get_model_metadata("resnet")
    assert not client.is_model_ready("resnet") and not client.is_model_ready("scalp", "7")


def test_a_client_of_grpc_finds_the_model_and_grades_as_the_endpoint_does(grpc_client, truth):
    client = grpc_client
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("scalp")
    assert client.get_server_metadata().extensions == ["binary_tensor_data"]
    metadata = client.get_model_metadata("scalp")
    assert metadata.versions == [truth[0]["model_version"]]
    assert tuple(output.name for output in metadata.outputs) == OUTPUTS
    check(client.infer("scalp", [photographs(IMAGES, triton_grpc)]), truth)
    (version,) = metadata.versions
    assert client.is_model_ready("scalp", version)
    wanted = [triton_grpc.InferRequestedOutput(name) for name in OUTPUTS]
    for data, answer in zip(IMAGES, truth, strict=True):
        tensors = [photographs([data], triton_grpc)]
        result = client.infer("scalp", tensors, version, outputs=wanted, request_id="visit-7")
        check(result, [answer])
        assert result.get_response().id == "visit-7"


def test_a_client_of_grpc_is_told_why(grpc_client):
    for images, status, message in (
        ([b"a text"], "INVALID_ARGUMENT", "not_an_image: .* not one of JPEG"),
        ([IMAGES[0], IMAGES[1][:3000]], "INVALID_ARGUMENT", "truncated: image 1: "),
        (IMAGES * 11, "RESOURCE_EXHAUSTED", "too_many_photographs: 33 images; the limit is 32"),
        ([bytes(33 * 2**20)], "RESOURCE_EXHAUSTED", "larger than max"),
    ):
        with pytest.raises(InferenceServerException, match=message) as raised:
            grpc_client.infer("scalp", [photographs(images, triton_grpc)])
        assert raised.value.status() == f"StatusCode.{status}"
    for name, version in (("resnet", ""), ("scalp", "7")):
        with pytest.raises(InferenceServerException, match="unknown_model: ") as raised:
            grpc_client.is_model_ready(name, version)
        assert raised.value.status() == "StatusCode.NOT_FOUND"


def test_a_call_that_takes_longer_than_its_deadline_ends(grpc_client, truth):
    tensors = [photographs(IMAGES * 10, triton_grpc)]
    with pytest.raises(InferenceServerException) as raised:
        grpc_client.infer("scalp", tensors, client_timeout=0.02)
    assert raised.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    check(grpc_client.infer("scalp", [photographs(IMAGES, triton_grpc)]), truth)  # the endpoint goes on
