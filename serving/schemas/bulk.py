"""Schemas of bulk grading: settings of the operator, requests and responses."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scalp_core.results.schema import COLUMNS
from serving.auth.scopes import canonical_uri, is_below
from serving.schemas.grading import SymptomGrade

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
        ("--replicas", "1", "--cpus-per-replica", "1", "--loaders", "1"),
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

    id: str = Field(description="id of the run")
    status: Status = Field(description="the same POST resumes a failed or stopped run")
    source: str = Field(description="source of the run")
    out: str = Field(description="output directory of `scalp grade`")
    model_version: str | None = Field(description="model version in the rows; null until the run has started")
    photographs: Photographs = Field(description="images so far")
    photographs_per_second: float | None = Field(description="rate of the run; null before it grades")
    error: str | None = Field(description="one line if the run failed")
    started_at: datetime | None = Field(description="start of the last job")
    ended_at: datetime | None = Field(description="end of the last job")
    links: BulkLinks = Field(description="paths of further requests")


class BulkList(BaseModel):
    """Bulk runs of the caller; of all owners for a key with the scope admin."""

    runs: list[BulkResponse] = Field(description="runs in the order of their ids")
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


def _column(name: str, default: Any = ...) -> Any:
    return Field(default, description=COLUMNS[name][1])


class BulkRow(BaseModel):
    """One result row of a graded or failed image; the columns of the Parquet files."""

    image_id: str | None = _column("image_id")
    location_id: str = _column("location_id")
    uri: str = _column("uri")
    member: str | None = _column("member")
    sha256: str | None = _column("sha256")
    status: Literal["graded", "failed"] = _column("status")
    error_code: str | None = _column("error_code")
    error: str | None = _column("error")
    grade: int | None = _column("grade")
    grade_name: str | None = _column("grade_name")
    probabilities: list[float] | None = _column("probabilities")
    expected_severity: float | None = _column("expected_severity")
    grade_set: list[int] | None = _column("grade_set")
    unlikeness: float | None = _column("unlikeness")
    refer: bool | None = _column("refer")
    refer_reasons: list[str] | None = _column("refer_reasons")
    other_symptoms: dict[str, SymptomGrade | None] | None = _column("other_symptoms", None)
    notes: list[str] | None = _column("notes")
    model_version: str | None = _column("model_version")
    computed_by: str | None = _column("computed_by")
    graded_at: datetime | None = _column("graded_at")


class BulkRows(BaseModel):
    """A page of result rows, in the order of the files."""

    id: str = Field(description="id of the run")
    rows: list[BulkRow] = Field(description="rows of the page")
    next: str | None = Field(description="`cursor` of the next page; null on the last one")


class BulkFiles(BaseModel):
    """The Parquet files with the rows."""

    id: str = Field(description="id of the run")
    out: str = Field(description="output directory of `scalp grade`")
    files: list[str] = Field(description="names below `out`")
