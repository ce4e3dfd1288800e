"""What the endpoint answers: one graded image, the model behind it, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr

from scalp_core.bundles.bundle import BundleSpec, Conformal, Referral
from scalp_core.datasets.manifest import image_id
from scalp_core.grades import GRADE_NAMES_KO
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.decision import REASONS, Grading
from scalp_core.results.schema import Signature

if TYPE_CHECKING:  # clients read these schemas, and need nothing that runs a model
    from scalp_core.inference.predictor import Predictor

INTENDED_USE = "Research and screening support. Not a diagnosis; a referral asks for a person's judgement."


class GradeResponse(BaseModel):
    """One graded image: the fields of a bulk result row, with `status` always `graded`."""

    image_id: str = Field(
        description="start of `sha256`, as in bulk rows and manifests: the same bytes have the same id"
    )
    location_id: str | None = Field(None, description="bulk only: identifies `uri` and `member`")
    uri: str | None = Field(None, description="bulk only: where the image is")
    member: str | None = Field(
        None,
        description="the entry of the archive; of a batch the name in it, or the number of the `file` part",
    )
    sha256: str = Field(description="of the bytes that were sent")
    status: Literal["graded"] = "graded"
    error_code: str | None = Field(None, description="bulk only: online, a failure is a problem instead")
    error: str | None = None
    grade: int = Field(ge=0, le=3, description="the likeliest grade: 0 good, 1 mild, 2 moderate, 3 severe")
    grade_name: str
    probabilities: list[float] = Field(min_length=4, max_length=4, description="calibrated, by grade; sum 1")
    expected_severity: float = Field(description="mean grade under the probabilities, 0 to 3")
    grade_set: list[int] = Field(
        description="neighboring grades; they hold the true one with the promised share"
    )
    unlikeness: float | None = Field(
        description="distance from the training images; above 1 is flagged, null without gates"
    )
    refer: bool = Field(description="a person should look at the image")
    refer_reasons: list[str] = Field(
        description="; ".join(f"`{name}`: {meaning}" for name, meaning in REASONS.items())
    )
    notes: list[str] = Field(description="what to know of the file: `first_frame_only` of an animated one")
    model_version: str = Field(description="names the exact weights")
    computed_by: str = Field(description="device, precision, runtime and versions, as in bulk rows")
    graded_at: datetime
    _batch_size: int = PrivateAttr(0)

    @classmethod
    def of(
        cls, sha256: str, notes: Sequence[str], grading: Grading, signature: Signature, batch_size: int
    ) -> GradeResponse:
        """The answer for the image with this hash, graded now together with others."""
        answer = cls(
            image_id=image_id(sha256),
            sha256=sha256,
            notes=list(notes),
            graded_at=datetime.now(UTC),
            **vars(signature),
            **vars(grading),
        )
        answer._batch_size = batch_size
        return answer

    @property
    def batch_size(self) -> int:
        """Images in its forward pass; told in a header, for it says nothing of the image."""
        return self._batch_size


class Heatmap(BaseModel):
    """What spoke for a grade, to be laid over the square that the model saw."""

    grade: int = Field(ge=0, le=3, description="that is explained")
    png: str = Field(
        description="base64 of an RGBA PNG file of the model's input: viridis colors, opaque where the heat "
        "is most. By `preprocess.resize` of /v1/model the square is the whole upright image (squash), "
        "its middle (crop), or the image between bars (pad)"
    )
    meaning: str


class ExplainedResponse(GradeResponse):
    """One graded image with its heatmap."""

    heatmap: Heatmap

    @classmethod
    def explained(cls, answer: GradeResponse, heatmap: Heatmap) -> ExplainedResponse:
        """The same answer with a heatmap."""
        found = cls(**dict(answer), heatmap=heatmap)
        found._batch_size = answer.batch_size
        return found


class GradeName(BaseModel):
    """One grade by its number and both its names."""

    grade: int
    name: str
    name_ko: str


class CandidateState(BaseModel):
    """Another bundle that is tried, as this replica sees it."""

    mode: Literal["shadow", "canary"]
    share: float = Field(description="of the images")
    breaker: Literal["closed", "open", "half_open"] = Field(
        description="open: it failed too often and is not asked for a while; half_open: one image tries it"
    )
    failures: int = Field(description="of the last 20 images that it was to answer")


class ModelResponse(BaseModel):
    """The model that answers."""

    model_version: str
    created_at: datetime
    architecture: str = Field(description="timm name")
    grades: list[GradeName]
    preprocess: Preprocess
    conformal: Conformal
    referral: Referral
    gates: bool = Field(description="whether blurred images and such that are no scalps are noticed")
    metrics: dict[str, Any] = Field(description="as measured after training, by part of the data")
    synthetic: bool = Field(description="trained on synthetic images; not for clinical use")
    device: str
    precision: str = Field(description="of the forward pass: bf16, fp32 or int8")
    runtime: str = Field(description="what runs the model")
    load_error: str | None = Field(
        description="why the bundle that was asked for last does not answer and this one still does"
    )
    candidate: CandidateState | None = Field(None, description="a shadow or canary beside it")
    intended_use: str = INTENDED_USE

    @classmethod
    def of(cls, spec: BundleSpec, predictor: Predictor, load_error: str | None) -> ModelResponse:
        """What a bundle says of itself, under the endpoint's thresholds, and how it runs here."""
        names = zip(spec.grade_names, GRADE_NAMES_KO, strict=True)
        return cls(
            model_version=predictor.model_version,
            created_at=spec.created_at,
            architecture=spec.architecture,
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
    """Answer of the probes."""

    status: Literal["alive", "ready"]


class Problem(BaseModel):
    """A refusal or failure, as `application/problem+json` (RFC 9457)."""

    type: str = Field("about:blank", description="the status says the kind; `code` says it exactly")
    title: str = Field(description="the status in words")
    status: int
    detail: str = Field(description="one line for a person")
    code: str = Field(description="stable identifier; for images, the bulk rows' `error_code`")
    request_id: str = Field(description="as in the `X-Request-ID` header")
