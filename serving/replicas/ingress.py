"""The replica that meets the network: it decodes, asks the grader, and words the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import Depends, FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from scalp_core.errors import ImageError, UserError
from scalp_core.inference.overlay import MEANING
from serving.admission.decoding import Decoders
from serving.admission.limits import Load
from serving.admission.pixels import Admission
from serving.batch.window import Batches
from serving.bulk.work import Bulk, ServedModel
from serving.http import request_context
from serving.http.backpressure import bound_request_queues
from serving.http.problems import Refusal
from serving.observability.audit import AuditLog, open_log
from serving.observability.metrics import ImageMetrics
from serving.replicas.handles import DeploymentClient, GraderClient, hash_of
from serving.replicas.readiness import Readiness
from serving.replicas.rollout import Rollout
from serving.schemas.grading import ExplainedResponse, GradeResponse, Heatmap, ModelResponse
from serving.settings import Settings

CreateApi = Callable[[Settings, Load, AuditLog | None], FastAPI]


class Ingress:
    """Grades images one at a time.

    Args:
        settings: of the endpoint.
        grader: handle of the `Grader` deployment.
        explainer: handle of the `Explainer` deployment.
        create_api: makes the ASGI application of a replica.
        candidate: handle of the `Candidate` deployment, where there is one.
    """

    def __init__(
        self,
        settings: Settings,
        grader: DeploymentHandle,
        explainer: DeploymentHandle,
        create_api: CreateApi,
        candidate: DeploymentHandle | None = None,
    ) -> None:
        bound_request_queues()
        self._settings = settings
        self._create_api = create_api
        self.load = Load(settings.limits)
        self.audit = open_log(settings.audit, ray_serve.get_replica_context().replica_id.unique_id)
        self._metrics = ImageMetrics()
        self._decoders = Decoders()
        self._admission = Admission(settings.limits, self._decoders)
        self._explainer = DeploymentClient(explainer, self.load)
        self._grader = GraderClient(grader, self.load, self._metrics, self._decoders)
        self._readiness = Readiness(partial(self._grader.call, "check_ready"))
        self._models: GraderClient | Rollout = self._grader
        if settings.candidate and candidate:
            # Its own load: what a trial takes says nothing of the model that answers, and refuses nobody.
            second = GraderClient(candidate, Load(settings.limits), self._metrics, self._decoders)
            self._models = Rollout(
                settings.candidate, self._grader, second, self.audit, settings.answer_seconds
            )
        grade_paid = partial(self.grade, is_paid=True)
        self.batches = Batches(settings.batch, grade_paid, self._model_version, self._admission)
        self.bulk = Bulk(settings.bulk, self._served) if settings.bulk else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve when the constructor is done."""
        return self._create_api(self._settings, self.load, self.audit)

    async def grade(
        self, data: bytes, heatmap: bool = False, of_grade: int | None = None, is_paid: bool = False
    ) -> GradeResponse:
        """Grades the bytes of one image.

        Args:
            data: of the file.
            heatmap: whether to explain the grade as well.
            of_grade: to explain; None takes the likeliest.
            is_paid: whether its megapixels are taken from the owner's budget already.

        Raises:
            ImageError: they cannot be decoded.
            Refusal: too many wait, the owner's budget is used up, the answer takes too long, or there is no
                heatmap to be had.
        """
        try:
            async with asyncio.timeout(self._settings.answer_seconds):
                owner = request_context.current().owner
                cost = await self._admission.measure(owner, data)
                if not is_paid:
                    self._admission.take(owner, cost)
                answer = await self._answer(data, cost, heatmap, of_grade)
        except TimeoutError:
            raise Refusal(
                504, "too_slow", f"no answer within {self._settings.answer_seconds:g} s; try again"
            ) from None
        except ImageError as error:
            self._metrics.observe_unreadable(error.code)
            if self.audit is not None:
                self.audit.log_refusal(await asyncio.to_thread(hash_of, data), error.code)
            raise
        if self.audit is not None:
            self.audit.log_grade(answer)
        return answer

    async def _answer(self, data: bytes, cost: float, heatmap: bool, of_grade: int | None) -> GradeResponse:
        image, graded = await self._models.grade(data, cost)
        pixels, notes = image.decoded
        answer = GradeResponse.of(image.sha256, notes, graded.grading, graded.signature, graded.batch_size)
        if not heatmap:
            return answer
        grade = graded.grading.grade if of_grade is None else of_grade
        try:
            with self._metrics.stage("heatmap"):
                png = await self._explainer.call("heatmap", pixels, grade, graded.bundle)
        except UserError as error:
            # What crossed Ray carries a traceback; its cause is the line.
            raise Refusal(422, "no_heatmap", str(getattr(error, "cause", error))) from None
        picture = Heatmap(grade=grade, png=base64.b64encode(png).decode(), meaning=MEANING)
        return ExplainedResponse.explained(answer, picture)

    async def describe(self) -> ModelResponse:
        """The model as it runs now."""
        model: ModelResponse = await self._grader.call_with_timeout("describe")
        if isinstance(self._models, Rollout):
            model = model.model_copy(update={"candidate": self._models.describe()})
        return model

    async def _model_version(self) -> str:
        return (await self.describe()).model_version

    async def _served(self) -> ServedModel:
        bundle, model_version = await self._grader.call_with_timeout("served")
        return ServedModel(bundle, model_version, self._settings.precision)

    async def is_ready(self) -> bool:
        """Whether the model answers."""
        return await self._readiness.is_ready()


async def replica() -> Ingress:
    """The replica that this process is; not a plain function, which FastAPI would call in a thread."""
    return ray_serve.get_replica_context().servable_object


Replica = Annotated[Ingress, Depends(replica)]
