"""Schemas of bulk grading: settings of the operator, requests and responses."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.auth.scopes import canonical_uri, is_below

Status = Literal["pending", "running", "succeeded", "failed", "stopped"]


class BulkSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of bulk grading through the endpoint."""

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="prefixes that clients may grade below: `s3://BUCKET[/KEY]` or folders",
    )
    out: str = Field(description="output prefix, `s3://` or a folder; each bulk run has a folder below it")
    jobs: int = Field(1, ge=1, description="concurrent jobs; more are refused")
    options: tuple[str, ...] = Field(
        ("--models", "1", "--cpus-per-model", "1", "--loaders", "1"),
        description="options of `scalp grade` per job; the default leaves most of a machine to the endpoint",
    )

    @field_validator("sources", "out")
    @classmethod
    def _canonical(cls, value: Any) -> Any:
        return canonical_uri(value) if isinstance(value, str) else tuple(map(canonical_uri, value))

    @model_validator(mode="after")
    def _check_disjoint(self) -> BulkSettings:
        for source in self.sources:
            if is_below(self.out, source) or is_below(source, self.out):
                raise ValueError(f"out ({self.out}) and sources ({source}) must not lie in each other")
        return self


class BulkRequest(BaseModel):
    """Source of a bulk run."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"source": "s3://clinic/2024"}})

    source: str = Field(description="folder, prefix, zip or tar below an allowed prefix")


class Photographs(BaseModel):
    """Number of images so far."""

    done: int = Field(description="images with a result row")
    failed: int = Field(description="images among them that failed")
    total: int | None = Field(description="all images; null while unknown, for tars until the end")


class BulkLinks(BaseModel):
    """Paths of further requests."""

    work: str = Field(description="GET returns the progress, DELETE stops the run")
    report: str | None = Field(None, description="after success: the report, an HTML page")
    results: str | None = Field(None, description="after success: the rows, by pages or as a stream")
    files: str | None = Field(None, description="after success: the names of the Parquet files")


class BulkResponse(BaseModel):
    """Status and progress of a bulk run."""

    id: str
    status: Status = Field(description="the same POST resumes a failed or stopped run")
    source: str
    out: str = Field(description="output directory of `scalp grade`")
    model_version: str | None = Field(description="model version in the rows; null until the run has started")
    photographs: Photographs
    photographs_per_second: float | None
    error: str | None = Field(description="one line if the run failed")
    started_at: datetime | None
    ended_at: datetime | None
    links: BulkLinks


class BulkList(BaseModel):
    """Bulk runs of the caller; of all owners for a key with the scope admin."""

    runs: list[BulkResponse] = Field(description="runs in the order of their ids")
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


class BulkRow(BaseModel):
    """One result row of a graded or failed image."""

    image_id: str | None = Field(description="start of `sha256`; null where the bytes were unavailable")
    location_id: str = Field(description="identifies `uri` and `member`")
    uri: str = Field(description="location of the image, or of its archive")
    member: str | None = Field(description="name in the archive, if `uri` is an archive")
    sha256: str | None
    status: Literal["graded", "failed"]
    error_code: str | None = Field(description="stable identifier of a failure; null for a graded image")
    error: str | None = Field(description="one line for a person")
    grade: int | None = Field(description="0 good, 1 mild, 2 moderate, 3 severe; null for a failed image")
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
