"""Read and write bodies of the Open Inference Protocol: JSON, followed by binary tensor data.

A BYTES tensor is the elements in a row, each after its length as 4 bytes, little-endian.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from pydantic import ValidationError

from serving.http.problems import Refusal
from serving.schemas.grading import GradeResponse
from serving.schemas.inference import (
    OUTPUTS,
    InferOutput,
    InferRequest,
    InferResponse,
    RequestedOutput,
    make_output,
    model_versions,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
_LENGTH_BYTES = 4
# A parsed value takes up to 40 times the memory of its text. No base64 contains a comma.
_MOST_COMMAS = 4096


def read_infer_request(
    pieces: list[bytes], header_length: int | None, max_images: int
) -> tuple[InferRequest, list[bytes]]:
    """Parse a request, and return it with its images.

    Args:
        pieces: Body of the request. The list is emptied, so that its memory is free while images are graded.
        header_length: Length of the JSON; None if it is the whole body.
        max_images: Maximum number of images.

    Raises:
        Refusal: The request does not follow the protocol (400), or has too many images (413).
    """
    body = b"".join(pieces)
    pieces.clear()
    size = len(body) if header_length is None else header_length
    if size > len(body):
        raise _bad(f"{HEADER_LENGTH} is {size:,}, but the body has {len(body):,} bytes")
    head, binary = body[:size], memoryview(body)[size:]
    if head.count(b",") > _MOST_COMMAS:
        raise _bad(f"the JSON has more than {_MOST_COMMAS:,} values")
    try:
        request = InferRequest.model_validate_json(head)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _bad(f"{where}: {first['msg']}" if where else first["msg"]) from None
    tensor = request.inputs[0]
    (count,) = tensor.shape
    check_count(count, max_images)
    declared = tensor.parameters.binary_data_size
    if (declared is None) == (tensor.data is None):
        raise _bad("the input needs either data or the parameter binary_data_size")
    if len(binary) != (declared or 0):
        raise _bad(f"binary_data_size is {declared or 0:,}, but {len(binary):,} bytes follow the JSON")
    images = list(split_elements(binary, count) if tensor.data is None else _decode(tensor.data))
    tensor.data = None
    if len(images) != count:
        raise _bad(f"the shape is [{count}], but data has {len(images)} elements")
    return request, images


def check_count(count: int, max_images: int) -> None:
    """Check the number of images of a request.

    Raises:
        Refusal: It is below one (400) or above the limit (413).
    """
    if count < 1:
        raise _bad(f"the shape is [{count}]; the request needs an image")
    if count > max_images:
        raise Refusal(
            413, "too_many_photographs", f"{count} images; the limit is {max_images}; divide the request"
        )


def split_elements(binary: memoryview, count: int) -> Iterator[bytes]:
    """Split the binary data of a BYTES tensor into `count` elements.

    Raises:
        Refusal: The lengths of the elements do not add up.
    """
    place = 0
    for number in range(count):
        start = place + _LENGTH_BYTES
        place = start + int.from_bytes(binary[place:start], "little")
        if start > len(binary) or place > len(binary):
            raise _bad(f"image {number} ends after the binary data, which has {len(binary):,} bytes")
        yield bytes(binary[start:place])
    if place != len(binary):
        raise _bad(f"{len(binary) - place:,} bytes follow the last image of the binary data")


def _decode(data: list[str]) -> Iterator[bytes]:
    for number, text in enumerate(data):
        try:
            yield base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):  # ValueError: characters that are not ASCII
            raise _bad(f"data[{number}] is not the base64 of an image file") from None


def write_infer_response(request: InferRequest, answers: list[GradeResponse]) -> tuple[bytes, bytes]:
    """Return the JSON of the answer, and the binary tensor data that follows it."""
    outputs, binary = [], []
    for wanted in request.outputs or [RequestedOutput(name=name) for name in OUTPUTS]:
        datatype, array = make_output(wanted.name, answers)
        output = InferOutput(name=wanted.name, datatype=datatype, shape=list(array.shape))
        form = wanted.parameters
        if form.binary_data if form else request.parameters.binary_data_output:
            binary.append(array.tobytes())
            output.parameters = {"binary_data_size": array.nbytes}
        else:
            output.data = array.ravel().tolist()
        outputs.append(output)
    answer = InferResponse(model_version=model_versions(answers), id=request.id, outputs=outputs)
    return answer.model_dump_json(exclude_none=True).encode(), b"".join(binary)


def _bad(why: str) -> Refusal:
    return Refusal(400, "bad_inference_request", f"{why}; /v2/models/scalp describes inputs and outputs")
