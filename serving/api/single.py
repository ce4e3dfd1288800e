"""Read the body of `POST /v1/grade`: an image as it is, or the field `file` of a form."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from scalp_core.errors import ImageError
from serving.auth.scopes import KEEP, NAMES_OF_NEEDS
from serving.http import request_context
from serving.http.multipart import MEDIA_TYPE as FORM
from serving.http.multipart import read_file, read_form
from serving.http.problems import Refusal, forbidden, refuse_image
from serving.schemas.store import StoreSettings

# Content types that clients may send; the bytes decide the format.
IMAGES = (
    "image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "application/dicom",
    "application/octet-stream",
)  # fmt: skip
_MAX_PARTS = 16
_MAX_OPTION_BYTES = 64


def _true_or_false(text: Any) -> bool:
    """Accept true and false only, as the schema says; pydantic also accepts `0`, `off` or `y`."""
    words = {"true": True, "false": False}
    if isinstance(text, str) and text.lower() in words:
        return words[text.lower()]
    if isinstance(text, bool):
        return text
    raise ValueError("write true or false")


class GradeOptions(BaseModel):
    """Options of a request, in the query or as fields of the form."""

    heatmap: Annotated[bool, BeforeValidator(_true_or_false)] = Field(
        False, description="also return a heatmap of the regions that support the grade"
    )
    heatmap_grade: int | None = Field(
        None, ge=0, le=3, description="grade that the heatmap explains; default: the likeliest"
    )
    keep: Annotated[bool, BeforeValidator(_true_or_false)] = Field(
        False,
        description="keep the image, without metadata, in the endpoint's store for reviews; only if the "
        "person agreed to it",
    )


def request_body() -> dict[str, Any]:
    """OpenAPI `requestBody` of the route."""
    file = {"type": "string", "format": "binary"}
    options = GradeOptions.model_json_schema()["properties"]
    form = {"type": "object", "properties": {"file": file, **options}, "required": ["file"]}
    content = {FORM: {"schema": form}} | {kind: {"schema": file} for kind in IMAGES}
    return {"requestBody": {"required": True, "content": content}}


async def read_image(request: Request, options: GradeOptions) -> tuple[bytes, GradeOptions]:
    """Read the image of a request into memory, with its options; images are not written to disk.

    Args:
        options: Options of the query; fields of the form take precedence.

    Raises:
        Refusal: 415 for another Content-Type, 400 or 422 for a form without one image.
        RequestValidationError: An option is out of range.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind in IMAGES:
        return _accepted(await read_file(request.stream())), options
    if kind != FORM:
        raise Refusal(
            415,
            "unsupported_body",
            f"send the image as the field `file` of {FORM}, or as the body with its Content-Type: "
            f"{', '.join(IMAGES)}",
        )
    image, given = None, options.model_dump(exclude_unset=True)
    async for field, data in read_form(request.stream(), content_type, _MAX_PARTS):
        if field in GradeOptions.model_fields:
            given[field] = _accepted(await read_file(data))[:_MAX_OPTION_BYTES].decode("utf-8", "replace")
        elif field == "file":
            if image is not None:
                raise Refusal(422, "several_files", "send one image; /v1/grade/batch takes many")
            image = _accepted(await read_file(data))
    if image is None:
        raise Refusal(422, "no_file", f"send one image as the field `file` of {FORM}")
    try:
        return image, GradeOptions.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def check_keep(store: StoreSettings | None) -> None:
    """Check that the current request may keep its image.

    Raises:
        Refusal: The endpoint has no store (422), or the key lacks the scope (403).
    """
    if store is None:
        raise Refusal(
            422,
            "no_store",
            "the endpoint keeps no images; omit keep, or start it with scalp serve --store FOLDER",
        )
    if not request_context.current().rights.allows(KEEP):
        raise forbidden(NAMES_OF_NEEDS[KEEP])


def _accepted(data: bytes | ImageError) -> bytes:
    if isinstance(data, ImageError):
        raise refuse_image(data)
    return data
