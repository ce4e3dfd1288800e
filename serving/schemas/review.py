"""Schemas of reviews through the endpoint: settings of the operator, requests and responses."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from scalp_core import storage
from scalp_core.bundles.registry import SCHEME
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Resize
from scalp_core.labels.log import MAX_COMMENT, Answer
from scalp_core.labels.queue import Order
from serving.schemas.grading import GradeName


class ReviewSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of reviews through the endpoint; the options of `scalp review`."""

    graded: str = Field(
        min_length=1,
        description="output directory of `scalp grade`, whose referred images are reviewed, or of "
        "`scalp audit-labels`",
    )
    labels: str = Field(min_length=1, description="directory of the label log, a folder or `s3://`")
    order: Order = Field("referred", description="order of the images, as `--order` of `scalp review`")
    show_model: bool = Field(
        False, description="whether readers see the model's answer; each of their answers is then marked"
    )
    all: bool = Field(False, description="open answered images too; otherwise only others")
    bundle: str | None = Field(
        None,
        description="bundle of the run: readers may ask for heatmaps of the images that it graded; labels "
        "given after that are marked",
    )
    neighbors: str | None = Field(
        None,
        description="prepared data whose training images readers may ask for, where `scalp neighbors` found "
        "them to look alike; needs `bundle`",
    )

    @field_validator("graded", "labels", "bundle", "neighbors")
    @classmethod
    def _absolute(cls, place: str | None, info: ValidationInfo) -> str | None:
        if place is None or (info.field_name == "bundle" and place.startswith(SCHEME)):
            return place
        try:
            return storage.absolute(place)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _has_bundle(self) -> ReviewSettings:
        if self.neighbors and not self.bundle:
            raise ValueError("neighbors needs the model that compared the images; set bundle")
        return self


class ReviewAnswer(Answer):
    """A grade, or a reason for its absence."""

    model_config = ConfigDict(strict=True, json_schema_extra={"example": {"grade": 2}})

    grade: int | None = Field(None, ge=0, lt=NUM_GRADES, description="grade, 0 to 3; null with a reason")
    reason: Literal["cannot_be_graded", "not_a_scalp"] | None = Field(
        None, description="reason of an answer without a grade; null with a grade"
    )
    comment: str | None = Field(None, max_length=MAX_COMMENT, description="free text")


class GivenAnswer(BaseModel):
    """An answer that was saved."""

    grade: int | None = Field(description="grade, 0 to 3; null with a reason")
    reason: str | None = Field(description="reason of an answer without a grade; null with a grade")
    comment: str | None = Field(description="free text")


class ModelAnswer(BaseModel):
    """The answer of the model to a referred image."""

    grade: int = Field(description="likeliest grade")
    probabilities: list[float] = Field(description="probability of each grade")
    expected_severity: float = Field(description="mean of the grades, weighted by their probabilities")
    grade_set: list[int] = Field(description="grades that the image may have")
    refer_reasons: list[str] = Field(description="reasons of the referral")
    model_version: str = Field(description="version of the model")


class ReviewState(BaseModel):
    """The review of the caller, and its state."""

    reader: str = Field(description="id of the key, which names the reader in the label log")
    adjudicate: bool = Field(description="whether the answers decide between readers who disagree")
    answered_too: bool = Field(description="whether the images include those that were answered before")
    grades: list[GradeName] = Field(description="grades and their names")
    images: int = Field(description="images of the review")
    first: str | None = Field(description="id of the first image; null without images")
    left: int = Field(description="images without an answer, or with adjudicate without a deciding one")
    first_open: str | None = Field(
        description="id of the first image without an answer; null if none is left"
    )
    resize: Resize | None = Field(
        description="which part of an image a heatmap's square covers; null if heatmaps are not offered"
    )


class ReviewImage(BaseModel):
    """An image of the review, as far as its reader may know it."""

    image_id: str = Field(description="id of the image, by its bytes")
    images: int = Field(description="images of the review")
    place: int = Field(description="place in the review, from 1")
    previous: str | None = Field(description="id of the image before it; null for the first one")
    next: str | None = Field(description="id of the image after it; null for the last one")
    answer: GivenAnswer | None = Field(
        description="answer of the caller, or with adjudicate the deciding answer; null without one"
    )
    saw_model: bool = Field(description="whether the next answer is marked as given with the model in view")
    has_heatmap: bool = Field(description="whether a heatmap is offered: the bundle of the review graded it")
    has_neighbors: bool = Field(description="whether similar training images are offered")
    model: ModelAnswer | None = Field(description="answer of the model; null in a blind review")
    answers: list[GivenAnswer] | None = Field(
        description="answers of the readers without names, to decide between them; otherwise null"
    )


class ReviewProgress(BaseModel):
    """A saved answer, and the state of the review after it."""

    answer: GivenAnswer = Field(description="answer as it is stored in the label log")
    left: int = Field(description="images without an answer, or with adjudicate without a deciding one")
    first_open: str | None = Field(
        description="id of the first image without an answer; null if none is left"
    )


class Revealed(BaseModel):
    """The record that a reader asked for the model's view of an image."""

    saw_model: bool = Field(description="true: later answers of the caller to the image are marked")


class ReviewNeighbor(BaseModel):
    """A training image that looks like an image of the review."""

    grade: int = Field(description="grade in the training data; it may be wrong")
    picture: str | None = Field(
        description="base64 of a JPEG, at most 384 pixels wide and high; null if the image cannot be read"
    )


class ReviewNeighbors(BaseModel):
    """Training images that look most like an image to the model, the most alike first."""

    neighbors: list[ReviewNeighbor] = Field(description="at most six")
