"""NDJSON lines of a batch response for failed images and for the end."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, Field

from scalp_core.datasets.manifest import image_id
from scalp_core.errors import ImageError
from serving.http.problems import Refusal


class FailedLine(BaseModel):
    """An image that cannot be graded, with the fields of a failed row of bulk grading."""

    image_id: str | None = Field(description="start of the sha256; null if the bytes were unavailable")
    location_id: None = None
    uri: None = None
    member: str = Field(description="number of the `file` part, from 0, or the name in the archive")
    sha256: str | None = Field(
        description="SHA-256 of the bytes that were sent; null if they were unavailable"
    )
    status: Literal["failed"] = "failed"
    error_code: str = Field(
        description="stable identifier: `code` of the problem that /v1/grade would return"
    )
    error: str = Field(description="one line for a person")
    grade: None = None
    grade_name: None = None
    probabilities: None = None
    expected_severity: None = None
    grade_set: None = None
    unlikeness: None = None
    refer: None = None
    refer_reasons: None = None
    notes: list[str] = []
    model_version: str
    computed_by: None = None
    graded_at: datetime = Field(description="time of the failure")

    @classmethod
    def of(cls, member: str, sha256: str | None, error: ImageError, model_version: str) -> FailedLine:
        """Make the line of an image that failed now."""
        return cls(
            image_id=sha256 and image_id(sha256),
            member=member,
            sha256=sha256,
            error_code=error.code,
            error=error.message,
            model_version=model_version,
            graded_at=datetime.now(UTC),
        )


class EndLine(BaseModel):
    """The last line. A response without it was cut off."""

    status: Literal["done", "aborted"] = Field(description="aborted: some images have no line")
    error_code: str | None = Field(None, description="why it was aborted, as the `code` of a problem")
    error: str | None = Field(None, description="the same for a person")
    graded: int = Field(description="number of such lines before")
    failed: int = Field(description="number of such lines before")

    @classmethod
    def of(cls, refusal: Refusal | None, graded: int, failed: int) -> EndLine:
        """Make the last line of a complete response, or of one that was refused after its first line."""
        if refusal is None:
            return cls(status="done", graded=graded, failed=failed)
        return cls(
            status="aborted", error_code=refusal.code, error=refusal.detail, graded=graded, failed=failed
        )
