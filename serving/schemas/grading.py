"""Schemas of grading: what a grader returns, responses and lines of batches, the model, and problems."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from scalp_core.bundles.contract import BundleSpec, Conformal, Referral
from scalp_core.datasets.manifest import image_id
from scalp_core.errors import ImageError
from scalp_core.grades import GRADE_NAMES_KO
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.decision import REASONS, Grading
from scalp_core.results.schema import Signature

if TYPE_CHECKING:  # clients read these schemas, and need nothing that runs a model
    from scalp_core.inference.predictor import Predictor

INTENDED_USE = "Research and screening support. Not a diagnosis; a referral asks for a person's judgement."


class Graded(NamedTuple):
    """Message from a grader to an ingress: grading of one image, with its model and durations."""

    grading: Grading
    signature: Signature
    bundle: str  # location with a pinned version
    batch_size: int
    queue_seconds: float
    forward_seconds: float


class SymptomGrade(BaseModel):
    """Grade of a symptom other than that of `grade`."""

    grade: int = Field(ge=0, le=3, description="the likeliest grade")
    grade_name: str = Field(description="name of the grade")
    probabilities: list[float] = Field(min_length=4, max_length=4, description="calibrated, by grade; sum 1")


class GradeResponse(BaseModel):
    """One graded image, with the fields of a bulk result row."""

    image_id: str = Field(description="start of `sha256`, as in bulk rows and manifests")
    location_id: str | None = Field(None, description="bulk only: identifies `uri` and `member`")
    uri: str | None = Field(None, description="bulk only: location of the image")
    member: str | None = Field(
        None,
        description="name in the archive; in a batch of a form the number of the `file` part",
    )
    sha256: str = Field(description="SHA-256 of the bytes that were sent")
    status: Literal["graded"] = Field("graded", description="a failed image has another schema")
    error_code: str | None = Field(None, description="bulk only: online, a failure is a problem")
    error: str | None = Field(None, description="bulk only")
    grade: int = Field(ge=0, le=3, description="the likeliest grade: 0 good, 1 mild, 2 moderate, 3 severe")
    grade_name: str = Field(description="name of the grade")
    probabilities: list[float] = Field(min_length=4, max_length=4, description="calibrated, by grade; sum 1")
    expected_severity: float = Field(description="mean grade under the probabilities, 0 to 3")
    grade_set: list[int] = Field(
        description="neighboring grades that contain the true grade with the conformal coverage"
    )
    unlikeness: float | None = Field(
        description="distance from the training images; above 1 is flagged, null without gates"
    )
    refer: bool = Field(description="a person should look at the image")
    refer_reasons: list[str] = Field(
        description="; ".join(f"`{name}`: {meaning}" for name, meaning in REASONS.items())
    )
    other_symptoms: dict[str, SymptomGrade] | None = Field(
        None, description="grades of other symptoms, by name, without a referral; null: the model has none"
    )
    notes: list[str] = Field(
        description="notes on the file, such as `first_frame_only` for an animated image"
    )
    model_version: str = Field(description="identifies the exact weights")
    computed_by: str = Field(description="device, precision, runtime and versions, as in bulk rows")
    graded_at: datetime = Field(description="time of the grading")

    @classmethod
    def of(cls, sha256: str, notes: Sequence[str], grading: Grading, signature: Signature) -> GradeResponse:
        """Make the response for the image with this hash, graded now."""
        return cls(
            image_id=image_id(sha256),
            sha256=sha256,
            notes=list(notes),
            graded_at=datetime.now(UTC),
            **vars(signature),
            **vars(grading),
        )


class Heatmap(BaseModel):
    """Heatmap of a grade, as an overlay of the model's input."""

    grade: int = Field(ge=0, le=3, description="grade that the heatmap explains")
    png: str = Field(
        description="base64 of an RGBA PNG file of the model's input size: viridis colors, opaque where the "
        "heat is highest. By `preprocess.resize` of /v1/model the square is the whole upright image "
        "(squash), its center (crop), or the image between bars (pad)"
    )
    meaning: str = Field(description="how to read it, for a person")


class ExplainedResponse(GradeResponse):
    """One graded image with its heatmap."""

    heatmap: Heatmap = Field(description="heatmap, as requested")


class FailedLine(BaseModel):
    """An image that cannot be graded, with the fields of a failed row of bulk grading."""

    image_id: str | None = Field(description="start of the sha256; null if the bytes were unavailable")
    location_id: None = None
    uri: None = None
    member: str = Field(description="number of the `file` part, from 0, or the name in the archive")
    sha256: str | None = Field(
        description="SHA-256 of the bytes that were sent; null if they were unavailable"
    )
    status: Literal["failed"] = Field("failed", description="a graded image has another schema")
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
    other_symptoms: None = None
    notes: list[str] = Field([], description="notes on the file")
    model_version: str = Field(description="identifies the exact weights")
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


class GradeName(BaseModel):
    """Number of a grade and its names in English and Korean."""

    grade: int = Field(description="number of the grade, 0 to 3")
    name: str = Field(description="English name")
    name_ko: str = Field(description="Korean name")


class CandidateState(BaseModel):
    """State of a shadow or canary, as this replica sees it."""

    mode: Literal["shadow", "canary"] = Field(
        description="shadow: grades copies of images; canary: answers a part of the images"
    )
    share: float = Field(description="part of the images that it gets")
    breaker: Literal["closed", "open", "half_open"] = Field(
        description="open: it failed too often and gets no images for a while; half_open: one image tests it"
    )
    failures: int = Field(description="failures among its last 20 images")


class ModelResponse(BaseModel):
    """The current model."""

    model_version: str = Field(description="identifies the exact weights")
    created_at: datetime = Field(description="end of the training")
    architecture: str = Field(description="timm name")
    symptom: str = Field(description="symptom of `grade`, such as `micro_keratin`")
    other_symptoms: list[str] = Field(description="names of the other symptoms that the model grades")
    grades: list[GradeName] = Field(description="names of the grades")
    preprocess: Preprocess = Field(description="from the file to the model's input")
    conformal: Conformal = Field(description="sets of grades with a promised coverage")
    referral: Referral = Field(description="when a person should look at the image")
    gates: bool = Field(description="whether the model detects blurred and out-of-distribution images")
    metrics: dict[str, Any] = Field(description="metrics measured after training, by split")
    synthetic: bool = Field(description="trained on synthetic images; not for clinical use")
    device: str = Field(description="device of the model: cpu or cuda")
    precision: str = Field(description="precision of the forward pass: bf16, fp32 or int8")
    runtime: str = Field(description="runtime of the model: openvino, torch or torch-compile")
    load_error: str | None = Field(
        description="error of the last bundle that could not be loaded; this model stays"
    )
    candidate: CandidateState | None = Field(None, description="shadow or canary that runs in parallel")
    intended_use: str = Field(INTENDED_USE, description="what the model is for")

    @classmethod
    def of(cls, spec: BundleSpec, predictor: Predictor, load_error: str | None) -> ModelResponse:
        """Make the description from the contract of a bundle and its predictor."""
        names = zip(spec.grade_names, GRADE_NAMES_KO, strict=True)
        return cls(
            model_version=predictor.model_version,
            created_at=spec.created_at,
            architecture=spec.architecture,
            symptom=spec.symptom,
            other_symptoms=list(spec.graded_others),
            grades=[GradeName(grade=grade, name=en, name_ko=ko) for grade, (en, ko) in enumerate(names)],
            preprocess=spec.preprocess,
            conformal=spec.conformal,
            referral=spec.referral,
            gates=spec.gates is not None,
            metrics=spec.metrics,
            synthetic=spec.training.synthetic,
            device=predictor.device,
            precision=predictor.precision,
            runtime=predictor.runtime,
            load_error=load_error,
        )


class Health(BaseModel):
    """Response of the probes."""

    status: Literal["alive", "ready"] = Field(description="alive: the process; ready: the model")


class Problem(BaseModel):
    """A refusal or failure, as `application/problem+json` (RFC 9457)."""

    type: str = Field("about:blank", description="not used: `code` identifies the problem")
    title: str = Field(description="name of the status")
    status: int = Field(description="status of the answer")
    detail: str = Field(description="one line for a person")
    code: str = Field(description="stable identifier; for images, the bulk rows' `error_code`")
    request_id: str = Field(description="id in the `X-Request-ID` header")
