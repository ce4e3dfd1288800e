"""Schemas of the store of kept images: settings of the operator, and the answer to a client that opts in."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from scalp_core import storage
from scalp_core.errors import UserError
from serving.schemas.grading import GradeResponse, Heatmap

NotKeptReason = Literal["not_referred", "identifying", "metadata", "store_full", "busy", "storage_failed"]

REASONS: dict[NotKeptReason, str] = {
    "not_referred": "the store takes referred images only",
    "identifying": "the DICOM file declares burned-in text or recognizable features",
    "metadata": "the metadata of the file cannot be removed",
    "store_full": "the store has `store.max_images` images",
    "busy": "too many images wait to be stored; send it again",
    "storage_failed": "the storage failed or did not confirm in time; the image may be there; send it again",
}
"""Reasons why a graded image was not kept."""


class StoreSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of the store, in which images of requests that opt in are kept for reviews."""

    folder: str = Field(
        min_length=1, description="directory of the store, a folder or `s3://`; `review.graded` may name it"
    )
    which: Literal["referred", "all"] = Field(
        "referred", description="images that are kept, of those whose request opts in"
    )
    max_images: int = Field(
        10_000, ge=1, description="images from which on none is added; replicas count them every minute"
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: str) -> str:
        try:
            return storage.absolute(folder)
        except UserError as error:
            raise ValueError(str(error)) from None


class Kept(BaseModel):
    """Whether the image of a request that opted in was kept."""

    image_id: str | None = Field(
        description="id of the stored file, for its removal; differs from that of the bytes that were sent "
        "if these had metadata. It is durable. null: not kept"
    )
    reason: NotKeptReason | None = Field(
        description="; ".join(f"`{name}`: {meaning}" for name, meaning in REASONS.items())
    )


class KeptResponse(GradeResponse):
    """One graded image whose request opted in, with its heatmap if requested."""

    kept: Kept = Field(description="whether the image was kept")
    heatmap: Heatmap | None = Field(None, description="heatmap, as requested")
