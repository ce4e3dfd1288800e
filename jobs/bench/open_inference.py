"""Requests to a server of the Open Inference Protocol v2 over HTTP, such as scalp, Triton or KServe."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx

from jobs.bench.load import Requests
from scalp_core.errors import UserError

_HEADER_LENGTH = "Inference-Header-Content-Length"
# The JSON is padded with spaces, so that all requests have the same header.
_HEAD_BYTES = 1024
_TIMEOUT_S = 60.0


def make_requests(url: str, model: str, files: list[bytes], key: str | None) -> Requests:
    """Make requests with one image each, as binary tensor data if the server supports it, otherwise in JSON.

    Args:
        model: Name of the model, whose only input must be BYTES.

    Raises:
        UserError: The server does not speak the protocol, or the model takes no image files.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    extensions = _get(url, "/v2", headers).get("extensions", ())
    path = f"/v2/models/{model}"
    inputs = _get(url, path, headers).get("inputs", [])
    if [tensor.get("datatype") for tensor in inputs] != ["BYTES"]:
        found = ", ".join(f"{tensor.get('name')} {tensor.get('datatype')}" for tensor in inputs) or "no input"
        raise UserError(
            f"{url}: the model {model} has {found}; image files are sent to models with one input BYTES"
        )
    (image,) = inputs
    tensor = {"name": image["name"], "datatype": "BYTES", "shape": [1] * len(image["shape"])}
    if "binary_tensor_data" not in extensions:
        bodies = [_body(tensor | {"data": [base64.b64encode(data).decode()]}) for data in files]
        return Requests(f"{path}/infer", {**headers, "Content-Type": "application/json"}, bodies)
    bodies = []
    for data in files:
        binary = len(data).to_bytes(4, "little") + data
        head = _body(tensor | {"parameters": {"binary_data_size": len(binary)}})
        bodies.append(head.ljust(_HEAD_BYTES) + binary)
    headers |= {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(_HEAD_BYTES)}
    return Requests(f"{path}/infer", headers, bodies)


def _body(tensor: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": [tensor]}).encode()


def _get(url: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    address = f"{url.rstrip('/')}{path}"
    try:
        answer = httpx.get(address, headers=headers, timeout=_TIMEOUT_S)
        body = answer.json() if answer.status_code == 200 else None
    except httpx.TransportError as error:
        raise UserError(f"{url} is unreachable: {error}; start the server") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError(
            f"{address} answers {answer.status_code}: {answer.text[:300].strip()}; "
            "--protocol oip needs a server of the Open Inference Protocol v2, and the --model that it has"
        )
    return body
