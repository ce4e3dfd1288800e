"""Schemas of the Open Inference Protocol v2: model metadata, requests and answers of inference, errors.

The protocol is that of https://github.com/open-inference/open-inference-protocol, with Triton's extension of
binary tensor data.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.grades import NUM_GRADES
from serving.schemas.grading import GradeResponse

MODEL_NAME = "scalp"
PLATFORM = "scalp"
INPUT = "image"
EXTENSIONS = ["binary_tensor_data"]

OutputName = Literal["grade", "probabilities", "grade_set", "refer"]
Datatype = Literal["BYTES", "BOOL", "INT32", "FP64"]

# Datatype and shape per image of each output; little-endian as in binary tensor data.
_OUTPUTS: dict[OutputName, tuple[Datatype, str, tuple[int, ...]]] = {
    "grade": ("INT32", "<i4", ()),
    "probabilities": ("FP64", "<f8", (NUM_GRADES,)),
    "grade_set": ("BOOL", "?", (NUM_GRADES,)),
    "refer": ("BOOL", "?", ()),
}
OUTPUTS: list[OutputName] = list(_OUTPUTS)


class OpenInferenceError(BaseModel):
    """Error of the Open Inference Protocol; `Retry-After` and the status are as for problems."""

    error: str = Field(description="one line for a person")


class ServerMetadata(BaseModel):
    """The server, and the extensions of the protocol that it supports."""

    name: str = Field(description="name of the server")
    version: str = Field(description="version of the HTTP interface")
    extensions: list[str] = Field(description="`binary_tensor_data`")


class ServerLive(BaseModel):
    """Liveness of the process."""

    live: bool = Field(description="true")


class ServerReady(BaseModel):
    """Readiness of the model; an error with 503 otherwise."""

    ready: bool = Field(description="true")


class ModelReady(ServerReady):
    """Readiness of a named model; an error with 503 otherwise."""

    name: str = Field(description="name of the model")


class TensorMetadata(BaseModel):
    """Name, datatype and shape of an input or output."""

    name: str = Field(description="name of the tensor")
    datatype: Datatype = Field(description="type of its elements")
    shape: list[int] = Field(description="-1: number of images")


class ModelMetadata(BaseModel):
    """The current model in terms of the protocol."""

    name: str = Field(MODEL_NAME, description="name of the model")
    versions: list[str] = Field(description="`model_version` of the current model")
    platform: str = Field(PLATFORM, description="kind of model")
    inputs: list[TensorMetadata] = Field(
        [TensorMetadata(name=INPUT, datatype="BYTES", shape=[-1])],
        description="image: bytes of image files (JPEG, PNG, WebP, BMP, TIFF, DICOM)",
    )
    outputs: list[TensorMetadata] = Field(
        [
            TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])
            for name, (datatype, _, shape) in _OUTPUTS.items()
        ],
        description="grade: the likeliest grade; probabilities: calibrated, by grade; grade_set: whether "
        "each grade is in the set; refer: whether a person should look at the image",
    )


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class InputParameters(_Strict):
    """Parameters of an input; others are ignored."""

    binary_data_size: int | None = Field(None, ge=0, description="bytes of the tensor after the JSON")


class InferInput(_Strict):
    """The images, either as `data` or after the JSON."""

    name: Literal["image"] = Field(description="the only input")
    shape: list[int] = Field(min_length=1, max_length=1, description="number of images")
    datatype: Literal["BYTES"] = Field(description="the bytes of image files")
    parameters: InputParameters = Field(InputParameters(), description="size of binary tensor data")
    data: list[str] | None = Field(None, description="base64 of each image file")


class OutputParameters(_Strict):
    """Parameters of a requested output; others are refused."""

    model_config = ConfigDict(extra="forbid")

    binary_data: bool = Field(False, description="return the tensor after the JSON")


class RequestedOutput(_Strict):
    """An output that the answer should contain."""

    name: OutputName = Field(description="name of the output")
    parameters: OutputParameters | None = Field(None, description="form of the tensor")


class RequestParameters(_Strict):
    """Parameters of a request; others are ignored."""

    binary_data_output: bool = Field(
        False, description="return all tensors after the JSON, unless an output has parameters"
    )


class InferRequest(_Strict):
    """Request to grade images; they are graded all or none."""

    id: str | None = Field(None, description="returned in the answer")
    parameters: RequestParameters = Field(RequestParameters(), description="form of all outputs")
    inputs: list[InferInput] = Field(min_length=1, max_length=1, description="the input `image`")
    outputs: list[RequestedOutput] = Field([], description="requested outputs; default: all")


class InferOutput(BaseModel):
    """A tensor of the answer."""

    name: OutputName = Field(description="name of the output")
    datatype: Datatype = Field(description="type of its elements")
    shape: list[int] = Field(description="number of images, and elements per image")
    parameters: dict[str, Any] | None = Field(None, description="`binary_data_size`: bytes after the JSON")
    data: list[Any] | None = Field(None, description="elements in row-major order")


class InferResponse(BaseModel):
    """Gradings of the images of a request."""

    model_name: str = Field(MODEL_NAME, description="name of the model")
    model_version: str = Field(description="exact weights; several, with a comma, if a canary graded some")
    id: str | None = Field(None, description="id of the request")
    outputs: list[InferOutput] = Field(description="requested outputs")


def make_output(name: OutputName, answers: list[GradeResponse]) -> tuple[Datatype, np.ndarray]:
    """Datatype and tensor of an output; the first axis is the images."""
    datatype, dtype, _ = _OUTPUTS[name]
    if name == "grade_set":
        rows: list[Any] = [[grade in answer.grade_set for grade in range(NUM_GRADES)] for answer in answers]
    else:
        rows = [getattr(answer, name) for answer in answers]
    return datatype, np.array(rows, dtype)


def model_versions(answers: list[GradeResponse]) -> str:
    """Versions of the models that graded the images of a request."""
    return ",".join(dict.fromkeys(answer.model_version for answer in answers))
