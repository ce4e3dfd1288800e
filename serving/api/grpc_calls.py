"""Translate calls of the Open Inference Protocol over gRPC to requests over HTTP, and their answers back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

from grpc import StatusCode

from serving.http.openapi import BATCH_SIZE
from serving.http.problems import PROBLEM_CODE
from serving.http.tensors import HEADER_LENGTH
from serving.schemas.grpc_messages import message_class, parse_infer_message, parse_message

_STATUSES = {
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
# Other headers of a client do not reach HTTP. HAProxy sets x-forwarded-for.
_REQUEST_HEADERS = (
    "authorization", "x-request-id", "traceparent", "tracestate", "origin", "x-forwarded-for",
)  # fmt: skip
_RESPONSE_HEADERS = ("x-request-id", "traceparent", "retry-after", PROBLEM_CODE, BATCH_SIZE)
_MOST_DETAILS = 1000  # bytes, each of which may become three: clients accept 8 KiB of metadata
_MOST_NAME = 256  # bytes: HAProxy closes the connection of a request whose path is too long


class HttpRequest(NamedTuple):
    """Request over HTTP."""

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: Sequence[bytes | memoryview] = ()


class HttpAnswer(NamedTuple):
    """Answer over HTTP; the names of its headers have any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class CallError(Exception):
    """End of a call with a status.

    Args:
        status: Status of gRPC.
        details: Code of the problem and one line, as `code: line`.
        trailers: Trailing metadata.
    """

    def __init__(self, status: StatusCode, details: str, trailers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(details)
        self.status = status
        self.details = details.encode()[:_MOST_DETAILS].decode(errors="ignore")
        self.trailers = tuple(trailers)


def request_headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """HTTP headers from the metadata of a call; of several values the last."""
    return {name: value for name, value in metadata if name in _REQUEST_HEADERS and isinstance(value, str)}


def trailers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Trailing metadata from the headers of an answer."""
    names = (name.lower() for name in _RESPONSE_HEADERS)
    return tuple((name, headers[name]) for name in names if name in headers)


def call_error(answer: HttpAnswer) -> CallError:
    """The error of a call whose request was refused."""
    try:
        problem = json.loads(answer.body)
    except ValueError:  # two answers of HAProxy are HTML
        problem = {}
    code = answer.headers.get(PROBLEM_CODE) or problem.get("code", "bad_request")
    why = problem.get("error") or HTTPStatus(answer.status).phrase
    status = _STATUSES.get(answer.status, StatusCode.INVALID_ARGUMENT)
    return CallError(status, f"{code}: {why}", trailers(answer.headers))


def model_path(kind: str, message: bytes) -> str:
    """Path of the model that a message names, whose kind is `ModelMetadataRequest` or `ModelReadyRequest`.

    Raises:
        CallError: The message is damaged, or no model has such a name.
    """
    try:
        call = parse_message(kind, message)
    except ValueError as error:
        raise _bad(error) from None
    return _model_path(call.name, call.version)


def infer_request(message: bytes) -> HttpRequest:
    """Request from a `ModelInferRequest`, with its images as binary tensor data.

    Raises:
        CallError: The message is damaged or has several raw tensors, or no model has such a name.
    """
    try:
        call, raw, elements = parse_infer_message(message)
    except ValueError as error:
        raise _bad(error) from None
    if len(raw) > 1:
        raise _bad(f"raw_input_contents has {len(raw)} tensors; the model has one input")
    data: list[bytes | memoryview] = [*raw]
    if not raw:  # a BYTES tensor has each element after its length
        data += (part for image in elements for part in (len(image).to_bytes(4, "little"), image))
    size = sum(map(len, data))
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": size},
        }
        for tensor in call.inputs
    ]
    # An output with parameters does not follow binary_data_output.
    outputs = [
        {"name": output.name}
        | (
            {"parameters": _parameters(output.parameters) | {"binary_data": True}}
            if output.parameters
            else {}
        )
        for output in call.outputs
    ]
    head = {
        "id": call.id or None,
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    headers = {
        HEADER_LENGTH: str(len(text)),
        "content-length": str(len(text) + size),
        "content-type": "application/octet-stream",
    }
    path = f"{_model_path(call.model_name, call.model_version)}/infer"
    return HttpRequest("POST", path, headers, [text, *data])


def _bad(why: str | ValueError) -> CallError:
    return CallError(StatusCode.INVALID_ARGUMENT, f"bad_inference_request: {why}")


def _model_path(name: str, version: str) -> str:
    if max(len(name.encode()), len(version.encode())) > _MOST_NAME:
        why = f"unknown_model: the name or version of the model has more than {_MOST_NAME} bytes"
        raise CallError(StatusCode.NOT_FOUND, why)
    path = f"/v2/models/{quote(name, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _parameters(parameters: Any) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], field) if field else None for name, field in chosen.items()}


def infer_answer(answer: HttpAnswer) -> Any:
    """The `ModelInferResponse` with the tensors of an answer."""
    place = int(answer.headers[HEADER_LENGTH])
    head = json.loads(answer.body[:place])
    message = message_class("ModelInferResponse")(
        model_name=head["model_name"], model_version=head["model_version"], id=head.get("id", "")
    )
    for output in head["outputs"]:
        message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        end = place + output["parameters"]["binary_data_size"]
        message.raw_output_contents.append(answer.body[place:end])
        place = end
    return message
