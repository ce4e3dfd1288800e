"""Open Inference Protocol v2 (KServe, Triton) over HTTP: routes below `/v2`, on the path of `/v1/grade`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response

from scalp_core.errors import ImageError
from serving.http import openapi
from serving.http.problems import Refusal, refuse_image
from serving.http.tensors import HEADER_LENGTH, read_infer_request, write_infer_response
from serving.replicas.ingress import Ingress, Replica
from serving.schemas.inference import (
    EXTENSIONS,
    MODEL_NAME,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)

_TAG = "open inference"
_JSON, _BINARY = "application/json", "application/octet-stream"
_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"

Name = Annotated[str, Path(description=f"`{MODEL_NAME}`")]
Version = Annotated[str, Path(description="`model_version` of the current model")]
HeaderLength = Annotated[
    int | None,
    Header(alias=HEADER_LENGTH, ge=1, description="bytes of the JSON, if binary tensor data follows it"),
]

router = APIRouter(tags=[_TAG])


@router.get("/v2")
async def server_metadata(request: Request) -> ServerMetadata:
    """Describe the server."""
    return ServerMetadata(name=request.app.title, version=request.app.version, extensions=EXTENSIONS)


@router.get("/v2/health/live")
async def server_live() -> ServerLive:
    """Liveness probe: the process answers."""
    return ServerLive(live=True)


@router.get("/v2/health/ready")
async def server_ready(replica: Replica) -> ServerReady:
    """Readiness probe: the model answers."""
    await _check_ready(replica)
    return ServerReady(ready=True)


@router.get(_MODEL, responses=openapi.problem_responses(404))
async def model_metadata(replica: Replica, name: Name) -> ModelMetadata:
    """Describe inputs and outputs of the model `scalp`."""
    return ModelMetadata(versions=[await check_model(replica, name)])


@router.get(_VERSION, responses=openapi.problem_responses(404))
async def model_version_metadata(replica: Replica, name: Name, version: Version) -> ModelMetadata:
    """Describe inputs and outputs of this version of the model."""
    return ModelMetadata(versions=[await check_model(replica, name, version)])


@router.get(f"{_MODEL}/ready", responses=openapi.problem_responses(404))
async def model_ready(replica: Replica, name: Name) -> ModelReady:
    """Readiness of the model `scalp`."""
    check_name(name)
    await _check_ready(replica)
    return ModelReady(name=name, ready=True)


@router.get(f"{_VERSION}/ready", responses=openapi.problem_responses(404))
async def model_version_ready(replica: Replica, name: Name, version: Version) -> ModelReady:
    """Readiness of this version of the model."""
    await check_model(replica, name, version)
    return await model_ready(replica, name)


def _infer_options() -> dict[str, Any]:
    """Options of the routes that infer."""
    file = {"type": "string", "format": "binary"}
    content = {_JSON: {"schema": openapi.reference(InferRequest)}, _BINARY: {"schema": file}}
    header = {"description": f"as in the request, with {_BINARY}", "schema": {"type": "integer"}}
    ok = {"content": {_BINARY: {"schema": file}}, "headers": {HEADER_LENGTH: header}}
    return {
        "response_model": InferResponse,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: ok, **openapi.problem_responses(404, 415, 422)},
    }


@router.post(f"{_MODEL}/infer", **_infer_options())
async def infer(
    request: Request, replica: Replica, name: Name, header_length: HeaderLength = None
) -> Response:
    """Grade images, all or none; they are BYTES tensors: base64 in JSON, or binary tensor data after it.

    The images are not stored.
    """
    check_name(name)
    return await _infer(request, replica, header_length, None)


@router.post(f"{_VERSION}/infer", **_infer_options())
async def infer_version(
    request: Request, replica: Replica, name: Name, version: Version, header_length: HeaderLength = None
) -> Response:
    """Grade images with this version of the model, all or none."""
    await check_model(replica, name, version)
    return await _infer(request, replica, header_length, version)


async def _infer(
    request: Request, replica: Ingress, header_length: int | None, version: str | None
) -> Response:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refusal(415, "unsupported_body", f"the body is encoded as {encoding!r}; send it uncompressed")
    pieces = [piece async for piece in request.stream()]
    limit = replica.settings.limits.infer_images
    # In a thread: a body of 32 MiB takes 0.1 s.
    inference, images = await asyncio.to_thread(read_infer_request, pieces, header_length, limit)
    try:
        answers, batch_size = await replica.grade_together(images, version)
    except ImageError as error:
        raise refuse_image(error) from None
    head, binary = write_infer_response(inference, answers)
    headers = {openapi.BATCH_SIZE: str(batch_size)} | ({HEADER_LENGTH: str(len(head))} if binary else {})
    return Response(head + binary, headers=headers, media_type=_BINARY if binary else _JSON)


async def _check_ready(replica: Ingress) -> None:
    if not await replica.is_ready():
        raise Refusal(503, "not_ready", "the model does not answer yet; try again in a few seconds")


def check_name(name: str) -> None:
    """Check the name of a model.

    Raises:
        Refusal: There is no such model (404).
    """
    if name != MODEL_NAME:
        raise Refusal(404, "unknown_model", f"there is no model of this name; the only one is {MODEL_NAME}")


async def check_model(replica: Ingress, name: str, version: str | None = None) -> str:
    """Check the name and version of a model, and return the current version.

    Raises:
        Refusal: There is no such model or version (404).
    """
    check_name(name)
    current = (await replica.describe()).model_version
    if version not in (None, current):
        raise Refusal(404, "unknown_model", f"{name} has no such version; the current one is {current}")
    return current
