"""Bulk grading through the endpoint: what the operator sets, what clients ask, what they are told."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serving.bulk_sources import is_below, plain_uri

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
        return plain_uri(value) if isinstance(value, str) else tuple(map(plain_uri, value))

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
    results: str | None = Field(None, description="when it has succeeded: the names of the Parquet files")


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


class BulkResults(BaseModel):
    """The files with the rows."""

    id: str
    out: str
    files: list[str] = Field(description="names below `out`")
