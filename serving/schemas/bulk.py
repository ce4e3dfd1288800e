"""Bulk grading through the endpoint: what the operator sets, what clients ask, what they are told."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.auth.prefixes import canonical_uri, is_below

Status = Literal["pending", "running", "succeeded", "failed", "stopped"]


class BulkSettings(BaseModel):
    """Bulk grading through the endpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="prefixes, `s3://BUCKET[/KEY]` or folders: what lies below them may be graded",
    )
    out: str = Field(description="prefix, `s3://` or a folder, below which each piece of work has a folder")
    jobs: int = Field(1, ge=1, description="that run at once; more are refused")
    options: tuple[str, ...] = Field(
        ("--models", "1", "--cpus-per-model", "1", "--loaders", "1"),
        description="of `scalp grade`, for every job; these leave most of a machine to the endpoint",
    )

    @field_validator("sources", "out")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return canonical_uri(value) if isinstance(value, str) else tuple(map(canonical_uri, value))

    @model_validator(mode="after")
    def _apart(self) -> BulkSettings:
        for source in self.sources:
            if is_below(self.out, source) or is_below(source, self.out):
                raise ValueError(f"out ({self.out}) and sources ({source}) must not lie in each other")
        return self


class BulkRequest(BaseModel):
    """What is to be graded."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"source": "s3://clinic/2024"}})

    source: str = Field(description="folder, prefix, zip or tar below one of the prefixes that are allowed")


class Photographs(BaseModel):
    """Counts so far."""

    done: int = Field(description="that have a result row")
    failed: int = Field(description="of these")
    total: int | None = Field(description="null while it is not known; of tars, until the end")


class BulkLinks(BaseModel):
    """Paths to ask next."""

    work: str = Field(description="GET tells how far it is, DELETE stops it")
    report: str | None = Field(None, description="when it has succeeded: an HTML page, look at it first")
    results: str | None = Field(None, description="when it has succeeded: the rows, by pages or as a stream")
    files: str | None = Field(None, description="when it has succeeded: the names of the Parquet files")


class BulkResponse(BaseModel):
    """A piece of work and how far it is."""

    id: str
    status: Status = Field(
        description="a failed or stopped one goes on where it was when the same is posted again"
    )
    source: str
    out: str = Field(description="where the results are: what `scalp grade` writes")
    model_version: str | None = Field(description="that signs the rows; null until it has begun")
    photographs: Photographs
    photographs_per_second: float | None
    error: str | None = Field(description="one line if it failed")
    started_at: datetime | None
    ended_at: datetime | None
    links: BulkLinks


class BulkList(BaseModel):
    """Bulk runs that the caller owns; of all owners for a key with the scope admin."""

    runs: list[BulkResponse] = Field(description="in the order of their ids")
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


class BulkRow(BaseModel):
    """One result row: an image that was graded, or failed with a reason."""

    image_id: str | None = Field(description="start of `sha256`; null where the bytes were unavailable")
    location_id: str = Field(description="identifies `uri` and `member`")
    uri: str = Field(description="of the image, or of the archive that holds it")
    member: str | None = Field(description="name of the entry, when `uri` is an archive")
    sha256: str | None
    status: Literal["graded", "failed"]
    error_code: str | None = Field(description="stable identifier of a failure; null of a graded image")
    error: str | None = Field(description="one line for a person")
    grade: int | None = Field(description="0 good, 1 mild, 2 moderate, 3 severe; null of a failed image")
    grade_name: str | None
    probabilities: list[float] | None = Field(description="calibrated, by grade; sum 1")
    expected_severity: float | None
    grade_set: list[int] | None
    unlikeness: float | None = Field(description="above 1 is flagged; null without gates")
    refer: bool | None = Field(description="a person should look at the image")
    refer_reasons: list[str] | None
    notes: list[str] | None
    model_version: str | None
    computed_by: str | None
    graded_at: datetime | None


class BulkRows(BaseModel):
    """A page of result rows, in the order of the files."""

    id: str
    rows: list[BulkRow]
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


class BulkFiles(BaseModel):
    """The Parquet files with the rows."""

    id: str
    out: str
    files: list[str] = Field(description="names below `out`")
