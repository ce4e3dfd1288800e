"""Settings of the endpoint: `Settings` for its life, `ModelSettings` for what changes while it runs."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.haproxy import DRAINING_SECONDS, DRAINING_VARIABLE, POLICY_VARIABLE, Policy
from scalp_core.inference.predictor import Device, Precision, Runtime
from serving.admission.limits import Limits
from serving.auth.keys import KeySettings
from serving.batch.window import BatchSettings
from serving.observability.audit import AuditSettings
from serving.schemas.bulk import BulkSettings

_MARGIN_SECONDS = 10


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Typed):
    """The `user_config` of the grader: changed in place, without a restart and without a dropped request."""

    bundle: str = Field(description="directory, `s3://`, or `models://NAME@VERSION` of the bundle")
    max_batch_size: int = Field(16, ge=1, le=512, description="images in one forward pass")
    batch_wait_ms: float = Field(
        0,
        ge=0,
        le=1000,
        description="how long a batch that is not full waits for company; 0 suits most: what comes while the "
        "model is busy is the next batch anyway",
    )
    max_set_size: int | None = Field(
        None, ge=1, le=4, description="grades in a set from which a person is asked; None is the bundle's"
    )
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="probability below which a person is asked; None is the bundle's"
    )


class Scaling(_Typed):
    """How many replicas a deployment has, what each reserves, and how many requests it takes in."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(gt=0, description="of one replica, that the autoscaler aims at")
    max_ongoing_requests: int = Field(
        ge=1,
        description="that a replica holds at once; those above it wait in Ray's router, which looks for room "
        "once a second at worst, so that a full grader runs dry: keep it above what the ingresses admit",
    )
    max_queued_requests: int = Field(
        ge=0, description="that wait at each caller for a replica; those above it are refused"
    )
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(120, ge=0, description="longer than the other: models are slow to load")
    look_back_s: float = Field(
        15, gt=10, description="over which the autoscaler looks at the load; replicas tell it every 10 s"
    )
    cpus: float = Field(1, gt=0, description="logical CPUs that a replica reserves")
    gpus: float = Field(0, ge=0, description="GPUs, or a share of one, that a replica reserves")

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
                f"max_ongoing_requests ({self.max_ongoing_requests}): a full replica would look like one "
                "that is on target, and nothing would scale up"
            )
        return self


class CandidateSettings(_Typed):
    """A second bundle beside the first. It is named in the `user_config` of the deployment Candidate."""

    mode: Literal["shadow", "canary"] = Field(
        description="shadow: it gets copies, and the first answers; canary: it answers a share"
    )
    share: float = Field(
        0.1, gt=0, le=1, description="of the images; by their bytes, so that one is always treated alike"
    )


class Settings(_Typed):
    """The `args` of the application: what a replica is started with."""

    device: Device = Field("auto", description="where the model runs")
    precision: Precision = Field("auto", description="of the forward pass")
    runtime: Runtime = Field("auto", description="what runs the model")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of a forward pass; None takes the grader's CPUs",
    )
    ingress: Scaling = Scaling(target_ongoing_requests=32, max_ongoing_requests=512, max_queued_requests=256)
    grader: Scaling = Scaling(target_ongoing_requests=16, max_ongoing_requests=512, max_queued_requests=64)
    explainer: Scaling = Scaling(target_ongoing_requests=2, max_ongoing_requests=4, max_queued_requests=16)
    haproxy: bool = Field(
        True,
        description="HAProxy before the ingress instead of Ray's proxy, where the endpoint starts its own "
        "Ray; a cluster is started with or without it",
    )
    front: Policy = Field(
        Policy(),
        description="what HAProxy refuses, and TLS, where the endpoint starts its own Ray; on a cluster the "
        f"environment variable {POLICY_VARIABLE} has the same fields",
    )
    batch: BatchSettings = Field(BatchSettings(), description="bounds of /v1/grade/batch")
    bulk: BulkSettings | None = Field(None, description="/v1/bulk, which is not offered without it")
    candidate: CandidateSettings | None = Field(None, description="another bundle that is tried")
    answer_seconds: float = Field(
        30, gt=0, description="after which a request that has no answer yet is given up, with a 504"
    )
    graceful_shutdown_seconds: float | None = Field(
        None,
        gt=0,
        description="that a replica which is to end has for the requests it holds; it ends as soon as it "
        "holds none. None is enough for each of them, also for a batch that takes limits.batch_seconds",
    )
    wedged_seconds: float = Field(
        20, gt=0, description="that one forward pass may take; a replica that takes longer is replaced"
    )

    keys: KeySettings = KeySettings()
    limits: Limits = Limits()
    audit: AuditSettings = AuditSettings()
    access_log: bool = Field(
        False, description="a line for each request in Ray Serve's log; no paths, names, addresses or keys"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        graceful, least = self.graceful_shutdown_seconds, _draining_seconds() + self.answer_seconds
        if graceful is not None and graceful < least:
            raise ValueError(
                f"graceful_shutdown_seconds ({graceful:g}) must be {least:g} or more: the "
                f"{_draining_seconds():g} s in which a replica that ends still takes requests in "
                f"({DRAINING_VARIABLE}), and answer_seconds ({self.answer_seconds:g}); or leave it out"
            )
        if self.wedged_seconds >= self.answer_seconds:
            raise ValueError(
                f"wedged_seconds ({self.wedged_seconds:g}) must be below answer_seconds "
                f"({self.answer_seconds:g}), or requests fail before the replica that holds them is replaced"
            )
        if self.candidate and not self.audit.folder:
            raise ValueError("a candidate is compared by the audit log; set the folder of audit")
        admitted = self.limits.uploads + self.limits.in_flight
        if admitted >= self.ingress.max_ongoing_requests:
            raise ValueError(
                f"uploads and in_flight of limits ({admitted} together) must be below max_ongoing_requests "
                f"({self.ingress.max_ongoing_requests}) of the ingress, or Ray refuses before it can"
            )
        return self


def _draining_seconds() -> float:
    return float(os.environ.get(DRAINING_VARIABLE, DRAINING_SECONDS))


def check_batching(model: ModelSettings, max_ongoing_requests: int) -> None:
    """Refuses batches that could never fill.

    Raises:
        ValueError: says what to set.
    """
    if max_ongoing_requests < 2 * model.max_batch_size:
        raise ValueError(
            f"max_ongoing_requests ({max_ongoing_requests}) of the grader must be at least twice "
            f"max_batch_size ({model.max_batch_size}), or no batch fills while the one before it runs "
            "(ray#43288)"
        )


def deployment_options(scaling: Scaling, settings: Settings, *, is_ingress: bool = False) -> dict[str, Any]:
    """Options as `serve.deployment` takes them.

    Args:
        scaling: of the deployment.
        settings: of the endpoint.
        is_ingress: the deployment takes requests in; others only answer its calls.
    """
    longest = settings.answer_seconds + _MARGIN_SECONDS
    if is_ingress:
        longest += _draining_seconds() + settings.limits.batch_seconds
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": scaling.look_back_s,
        },
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": scaling.max_queued_requests,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_seconds or longest,
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
    }
