"""Settings of the endpoint: `Settings` at its start, `ModelSettings` for the model, changeable in place."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from cluster.haproxy import DRAINING_SECONDS, DRAINING_VARIABLE, POLICY_VARIABLE, Policy
from scalp_core.inference.predictor import Device, Precision, Runtime
from serving.admission.limits import Limits
from serving.auth.keys import KeySettings
from serving.batch.window import BatchSettings
from serving.observability.audit_writer import AuditSettings
from serving.observability.tracing import EXPORTER_VARIABLE, TracingSettings
from serving.schemas.bulk import BulkSettings
from serving.schemas.review import ReviewSettings
from serving.schemas.store import StoreSettings

_MARGIN_SECONDS = 10
_LOOK_BACK_SECONDS = 15  # of load that the autoscaler averages; replicas report every 10 s


class ModelSettings(BaseModel, extra="forbid", frozen=True):
    """The `user_config` of the grader: changes apply in place, without a restart or dropped requests."""

    bundle: str = Field(
        description="location of the bundle: a directory, `s3://`, or `models://NAME@VERSION`"
    )
    max_batch_size: int = Field(16, ge=1, le=512, description="images in one forward pass")
    max_set_size: int | None = Field(
        None,
        ge=1,
        le=4,
        description="size of the grade set from which an image is referred; None takes the bundle's",
    )
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="probability below which an image is referred; None takes the bundle's"
    )


class Scaling(BaseModel, extra="forbid", frozen=True):
    """Scaling of a deployment: replicas, their resources, and their queues."""

    min_replicas: int = Field(
        1,
        ge=0,
        description="replicas that always run; 0 for the explainer only: the first heatmap after a pause "
        "waits for a replica",
    )
    max_replicas: int = Field(1, ge=1, description="most replicas under load")
    target_ongoing_requests: float = Field(
        gt=0, description="requests per replica that the autoscaler aims at"
    )
    max_ongoing_requests: int = Field(
        ge=1,
        description="requests that a replica holds. More wait in Ray's router, which may retry once per "
        "second only, so that a full grader idles: keep it above the limits of all ingresses together",
    )
    max_queued_requests: int = Field(
        ge=0, description="requests per caller that wait for a replica; more are refused"
    )
    upscale_delay_s: float = Field(5, ge=0, description="seconds of load before a replica is added")
    downscale_delay_s: float = Field(
        120,
        ge=0,
        description="seconds of low load before a replica is removed; above upscale_delay_s, since models "
        "load slowly",
    )
    cpus: float = Field(1, gt=0, description="logical CPUs that a replica reserves")
    gpus: float = Field(0, ge=0, description="GPUs that a replica reserves; may be a fraction")

    @model_validator(mode="after")
    def _consistent(self) -> Scaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        if (
            self.max_replicas > self.min_replicas
            and self.target_ongoing_requests >= self.max_ongoing_requests
        ):
            raise ValueError(
                f"target_ongoing_requests ({self.target_ongoing_requests:g}) must be below "
                f"max_ongoing_requests ({self.max_ongoing_requests}): otherwise a full replica "
                "counts as on target, and the deployment does not scale up"
            )
        return self


class CandidateSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of a shadow or canary; the `user_config` of the deployment Candidate names its bundle."""

    mode: Literal["shadow", "canary"] = Field(
        description="shadow: grades copies of images; canary: answers a part of the images"
    )
    share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="part of the images; chosen by their hash, so that the same image is treated alike",
    )


class Settings(BaseModel, extra="forbid", frozen=True):
    """The `args` of the application: a change restarts the replicas."""

    device: Device = Field("auto", description="device of the model")
    precision: Precision = Field("auto", description="precision of the forward pass")
    runtime: Runtime = Field("auto", description="runtime of the model")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of a forward pass; None takes the grader's CPUs",
    )
    ingress: Scaling = Field(
        Scaling(target_ongoing_requests=32, max_ongoing_requests=512, max_queued_requests=256),
        description="replicas that check and decode images",
    )
    grader: Scaling = Field(
        Scaling(target_ongoing_requests=16, max_ongoing_requests=512, max_queued_requests=64),
        description="replicas of the model",
    )
    explainer: Scaling = Field(
        Scaling(target_ongoing_requests=2, max_ongoing_requests=4, max_queued_requests=16),
        description="replicas that make heatmaps",
    )
    front: Policy = Field(
        Policy(),
        description="limits and TLS of HAProxy, if the endpoint starts a local Ray; on a cluster the "
        f"environment variable {POLICY_VARIABLE} has the same fields",
    )
    batch: BatchSettings = Field(BatchSettings(), description="limits of /v1/grade/batch")
    bulk: BulkSettings | None = Field(None, description="settings of /v1/bulk; None turns it off")
    review: ReviewSettings | None = Field(
        None, description="settings of /v1/review and the page /review; None turns them off"
    )
    store: StoreSettings | None = Field(
        None, description="store of images whose requests opt in; None keeps no image"
    )
    candidate: CandidateSettings | None = Field(None, description="settings of a shadow or canary")
    cache_mib: int = Field(
        0,
        ge=0,
        description="MiB of each grader replica for answers, if an owner sends an image again; 0: off",
    )
    answer_seconds: float = Field(
        30, gt=0, description="seconds until a request without an answer fails with 504"
    )
    wedged_seconds: float = Field(
        20, gt=0, description="longest forward pass in seconds; Ray replaces a replica that takes longer"
    )

    keys: KeySettings = Field(KeySettings(), description="API keys")
    limits: Limits = Field(Limits(), description="limits of requests, bytes and pixels")
    audit: AuditSettings = Field(AuditSettings(), description="audit log")
    tracing: TracingSettings = Field(
        TracingSettings(),
        description="traces of OpenTelemetry, if the endpoint starts a local Ray; on a cluster "
        f"`{EXPORTER_VARIABLE}` of the nodes",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.wedged_seconds >= self.answer_seconds:
            raise ValueError(
                f"wedged_seconds ({self.wedged_seconds:g}) must be below answer_seconds "
                f"({self.answer_seconds:g}), or requests fail before their replica is replaced"
            )
        for name in ("ingress", "grader"):
            if getattr(self, name).min_replicas < 1:
                raise ValueError(f"{name}.min_replicas must be at least 1; only the explainer may have 0")
        if self.candidate and not self.audit.folder:
            raise ValueError("a shadow or canary is compared by the audit log; set audit.folder (--audit)")
        if self.audit.computed and not self.audit.folder:
            raise ValueError("audit.computed is about the lines of the audit log; set audit.folder (--audit)")
        if self.audit.computed and self.cache_mib:
            raise ValueError(
                f"audit.computed requires a forward pass per answer, but cache_mib ({self.cache_mib}) keeps "
                "answers; set cache_mib to 0, or audit.computed to false"
            )
        admitted = self.limits.uploads + self.limits.in_flight
        if admitted >= self.ingress.max_ongoing_requests:
            raise ValueError(
                f"uploads and in_flight of limits ({admitted} together) must be below max_ongoing_requests "
                f"({self.ingress.max_ongoing_requests}) of the ingress, or Ray refuses requests first"
            )
        return self


def check_batching(model: ModelSettings, max_ongoing_requests: int) -> None:
    """Check that batches can fill.

    Raises:
        ValueError: max_ongoing_requests is too small for max_batch_size.
    """
    if max_ongoing_requests < 2 * model.max_batch_size:
        raise ValueError(
            f"max_ongoing_requests ({max_ongoing_requests}) of the grader must be at least twice "
            f"max_batch_size ({model.max_batch_size}), or no batch fills while the one before it runs "
            "(ray#43288)"
        )


def deployment_options(scaling: Scaling, settings: Settings, *, is_ingress: bool = False) -> dict[str, Any]:
    """Options of `serve.deployment`. A stopping replica has time for the longest request that it accepted."""
    shutdown_seconds = settings.answer_seconds + _MARGIN_SECONDS
    if is_ingress:
        draining_seconds = float(os.environ.get(DRAINING_VARIABLE, DRAINING_SECONDS))
        shutdown_seconds += draining_seconds + settings.limits.batch_seconds
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": _LOOK_BACK_SECONDS,
        },
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
        "graceful_shutdown_timeout_s": shutdown_seconds,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
    }
