"""Ingress deployment: serves HTTP, decodes images, calls the grader, and makes the responses."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

from fastapi import Depends, FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from cluster.ray_internals import bound_request_queue
from scalp_core.errors import ImageError, UserError
from scalp_core.inference.overlay import MEANING
from serving.admission.decoding import Decoders
from serving.admission.limits import Load
from serving.admission.rate_limit import Admission
from serving.batch.window import Batches
from serving.bulk.work import Bulk, ServedModel
from serving.http import request_context
from serving.http.problems import Refusal
from serving.observability.audit import AuditLog
from serving.observability.metrics import ImageMetrics
from serving.replicas.handles import DeploymentClient, GraderClient, Handle, hash_of
from serving.replicas.keeper import Keeper
from serving.replicas.readiness import Readiness
from serving.replicas.rollout import Rollout
from serving.schemas.grading import ExplainedResponse, GradeResponse, Heatmap, ModelResponse
from serving.settings import Settings

CreateApi = Callable[[Settings, Load, AuditLog | None], FastAPI]


class Ingress:
    """Serve the HTTP API and grade its images."""

    def __init__(
        self,
        settings: Settings,
        grader: Handle,
        explainer: Handle,
        create_api: CreateApi,
        candidate: DeploymentHandle | None = None,
        reviewer: Handle | None = None,
    ) -> None:
        bound_request_queue()
        self.settings = settings
        self._create_api = create_api
        self.load = Load(settings.limits)
        self.audit = AuditLog(settings.audit) if settings.audit.folder else None
        self._metrics = ImageMetrics()
        self._decoders = Decoders()
        self._admission = Admission(settings.limits, self._decoders)
        self._explainer = DeploymentClient(explainer, self.load)
        self._grader = GraderClient(grader, self.load, self._metrics, self._decoders)
        self._readiness = Readiness(partial(self._grader.call, "check_ready"))
        self._models: GraderClient | Rollout = self._grader
        if settings.candidate and candidate:
            # A separate load: a slow candidate must not lead to refusals of the first model.
            second = GraderClient(candidate, Load(settings.limits), self._metrics, self._decoders)
            self._models = Rollout(
                settings.candidate, self._grader, second, self.audit, settings.answer_seconds
            )
        grade_paid = partial(self.grade, is_paid=True)
        self.batches = Batches(settings.batch, grade_paid, self._model_version, self._admission)
        self.bulk = Bulk(settings.bulk, self._served) if settings.bulk else None
        self.keeper = Keeper(settings.store, self._metrics, self.audit) if settings.store else None
        self.reviewer = DeploymentClient(reviewer, self.load) if reviewer else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Create the ASGI application; Ray Serve calls this after the constructor."""
        return self._create_api(self.settings, self.load, self.audit)

    async def grade(
        self, data: bytes, heatmap: bool = False, of_grade: int | None = None, is_paid: bool = False
    ) -> tuple[GradeResponse, int]:
        """Grade one image, and log it in the audit log; return the response and the batch size of its pass.

        Args:
            of_grade: Grade that the heatmap explains; None takes the likeliest.
            is_paid: Whether the owner's budget has been charged already.

        Raises:
            ImageError: The file cannot be decoded.
            Refusal: The queue is full, the owner's budget is used up, the answer takes too long, or the
                heatmap is unavailable.
        """
        try:
            async with asyncio.timeout(self.settings.answer_seconds):
                owner = request_context.current().owner
                cost = await self._admission.measure(owner, data)
                if not is_paid:
                    self._admission.take(owner, cost)
                answer, batch_size = await self._answer(data, cost, heatmap, of_grade)
        except TimeoutError:
            raise Refusal(
                504, "too_slow", f"no answer within {self.settings.answer_seconds:g} s; try again"
            ) from None
        except ImageError as error:
            self._metrics.observe_unreadable(error.code)
            if self.audit is not None:
                self.audit.log_refusal(await asyncio.to_thread(hash_of, data), error.code)
            raise
        if self.audit is not None:
            self.audit.log_grade(answer, cached=not batch_size)
        return answer, batch_size

    async def grade_together(
        self, images: Sequence[bytes], version: str | None = None
    ) -> tuple[list[GradeResponse], int]:
        """Grade the images of one request at the same time, all or none; see `grade`.

        Args:
            version: Model version that must grade them; None takes the current one.

        Returns:
            The responses, and the largest batch size of their passes.

        Raises:
            ImageError: An image cannot be decoded; the message has its number, from 0.
            Refusal: As `grade`; the images have too many pixels together, or another model graded one.
        """
        owner = request_context.current().owner
        self._admission.take(owner, await self._admission.measure_readable(owner, images))
        results = await asyncio.gather(
            *(self.grade(data, is_paid=True) for data in images), return_exceptions=True
        )
        answers, batch_sizes = [], []
        for number, result in enumerate(results):
            if isinstance(result, ImageError) and len(images) > 1:
                raise ImageError(result.code, f"image {number}: {result.message}")
            if isinstance(result, BaseException):
                raise result
            answers.append(result[0])
            batch_sizes.append(result[1])
        if version and {answer.model_version for answer in answers} != {version}:
            raise Refusal(503, "model_changes", f"another version than {version} graded an image; try again")
        return answers, max(batch_sizes)

    async def _answer(
        self, data: bytes, cost: float, heatmap: bool, of_grade: int | None
    ) -> tuple[GradeResponse, int]:
        if self.settings.cache_mib and not heatmap:
            sha256 = await asyncio.to_thread(hash_of, data)
            if cached := await self._models.find_cached(sha256):
                graded, notes = cached
                return GradeResponse.of(sha256, notes, graded.grading, graded.signature), 0
        image, graded = await self._models.grade(data, cost)
        pixels, notes = image.decoded
        answer = GradeResponse.of(image.sha256, notes, graded.grading, graded.signature)
        if not heatmap:
            return answer, graded.batch_size
        grade = graded.grading.grade if of_grade is None else of_grade
        try:
            with self._metrics.stage("heatmap"):
                png = await self._explainer.call("heatmap", pixels, grade, graded.bundle)
        except UserError as error:
            # An error through Ray has a traceback; its cause has the one-line message.
            raise Refusal(422, "no_heatmap", str(getattr(error, "cause", error))) from None
        explanation = Heatmap(grade=grade, png=base64.b64encode(png).decode(), meaning=MEANING)
        return ExplainedResponse(**dict(answer), heatmap=explanation), graded.batch_size

    async def describe(self) -> ModelResponse:
        """Describe the current model."""
        model: ModelResponse = await self._grader.call_with_timeout("describe")
        if isinstance(self._models, Rollout):
            model = model.model_copy(update={"candidate": self._models.describe()})
        return model

    async def _model_version(self) -> str:
        return (await self.describe()).model_version

    async def _served(self) -> ServedModel:
        bundle, model_version = await self._grader.call_with_timeout("served")
        return ServedModel(bundle, model_version, self.settings.precision)

    async def is_ready(self) -> bool:
        """Whether the model answered the last check."""
        return await self._readiness.is_ready()


async def replica() -> Ingress:
    """Dependency: the replica of this process; async, because FastAPI calls plain functions in a thread."""
    return ray_serve.get_replica_context().servable_object


Replica = Annotated[Ingress, Depends(replica)]
