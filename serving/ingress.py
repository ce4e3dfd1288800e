"""The replica that meets the network: it decodes, asks the grader, and words the answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import math
from typing import Annotated, Any, NamedTuple

import numpy as np
import ray.exceptions
from fastapi import Depends, FastAPI
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from scalp_core import explain, quality
from scalp_core.errors import ImageError, UserError
from scalp_core.preprocess import Decoded, Preprocess, decode
from serving.audit import open_log
from serving.backpressure import hold_back
from serving.batches import Batches
from serving.bulk_work import Bulk, Served
from serving.grader import Graded
from serving.limits import Load
from serving.metrics import PhotographMetrics
from serving.problems import Refusal
from serving.schemas import ExplainedResponse, GradeResponse, Heatmap, ModelResponse
from serving.settings import Settings

_READY_TIMEOUT_S = 5
# A replica that died took its requests with it. The same photograph has the same grade, so it is sent again.
_ATTEMPTS = 3
# The model may change its way in between two attempts, but not for ever.
_REMAKES = 3
_LEAST_RETRY_S = 1

_log = logging.getLogger("ray.serve")


class Photograph(NamedTuple):
    """A photograph on its way to the model; `statistics` are float (K,) from `quality.measure`."""

    sha256: str
    decoded: Decoded
    statistics: np.ndarray


class Ingress:
    """Grades photographs one at a time.

    Args:
        settings: of the endpoint.
        grader: handle of the `Grader` deployment.
        explainer: handle of the `Explainer` deployment.
    """

    def __init__(self, settings: Settings, grader: DeploymentHandle, explainer: DeploymentHandle) -> None:
        hold_back()
        self._settings = settings
        self.load = Load(settings.limits)
        self.audit = open_log(settings.audit, ray_serve.get_replica_context().replica_id.unique_id)
        # By value over gRPC: by reference each photograph, above Ray's 100 KB, would pass through the store.
        self._grader = grader.options(_by_reference=False)
        self._explainer = explainer.options(_by_reference=False)
        self._preprocess: Preprocess | None = None
        self._seconds_each = 0.0
        self._metrics = PhotographMetrics()
        self.batches = Batches(settings.batch, self.grade, self._model_version)
        self.bulk = Bulk(settings.bulk, self._served) if settings.bulk else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve when the constructor is done."""
        from serving.api import create_api  # whose routes need this class

        return create_api(self._settings, self.load, self.audit)

    async def grade(self, data: bytes, heatmap: bool = False, of_grade: int | None = None) -> GradeResponse:
        """Grades the bytes of one photograph.

        Args:
            data: of the file.
            heatmap: whether to explain the grade as well.
            of_grade: to explain; None takes the likeliest.

        Raises:
            ImageError: they cannot be decoded.
            Refusal: too many wait, the answer takes too long, or there is no heatmap to be had.
        """
        try:
            async with asyncio.timeout(self._settings.answer_seconds):
                answer = await self._answer(data, heatmap, of_grade)
        except TimeoutError:
            raise Refusal(
                504, "too_slow", f"no answer within {self._settings.answer_seconds:g} s; try again"
            ) from None
        except ImageError as error:
            if self.audit is not None:
                self.audit.refused(await asyncio.to_thread(_sha256, data), error.code)
            raise
        if self.audit is not None:
            self.audit.graded(answer)
        return answer

    async def _answer(self, data: bytes, heatmap: bool, of_grade: int | None) -> GradeResponse:
        photograph, graded = await self._graded(data)
        pixels, notes = photograph.decoded
        answer = GradeResponse.of(
            photograph.sha256, notes, graded.grading, graded.model_version, graded.batch_size
        )
        if not heatmap:
            return answer
        grade = graded.grading.grade if of_grade is None else of_grade
        try:
            with self._metrics.stage("heatmap"):
                png = await self._ask(self._explainer, "heatmap", pixels, grade, graded.bundle)
        except UserError as error:
            # What crossed Ray carries a traceback; its cause is the line.
            raise Refusal(422, "no_heatmap", str(getattr(error, "cause", error))) from None
        picture = Heatmap(grade=grade, png=base64.b64encode(png).decode(), meaning=explain.MEANING)
        return ExplainedResponse.explained(answer, picture)

    async def _graded(self, data: bytes) -> tuple[Photograph, Graded]:
        preprocess = self._preprocess or await self._ask(self._grader, "preprocess")
        for _ in range(_REMAKES):
            photograph = await self._read(data, preprocess)
            pixels, statistics = photograph.decoded.pixels, photograph.statistics
            found = await self._ask(self._grader, "grade", pixels, statistics, preprocess)
            if isinstance(found, Graded):
                self._preprocess = preprocess
                # Of the last few batches, for telling who is refused when to come again.
                each = found.forward_seconds / found.batch_size
                self._seconds_each += 0.2 * (each - self._seconds_each)
                self.load.observe(each)
                return photograph, found
            preprocess = found
        raise Refusal(503, "model_changes", "the model is being changed; try again in a few seconds")

    async def _read(self, data: bytes, preprocess: Preprocess) -> Photograph:
        try:
            with self._metrics.stage("decode"):
                return await asyncio.to_thread(read_photograph, data, preprocess)
        except ImageError as error:
            self._metrics.observe_unreadable(error.code)
            raise

    async def _ask(self, handle: DeploymentHandle, method: str, *arguments: Any) -> Any:
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._ask_once(handle, method, *arguments)
            except ray.exceptions.RayActorError:
                _log.warning("a replica died with a request, which is sent again")
        return await self._ask_once(handle, method, *arguments)

    async def _ask_once(self, handle: DeploymentHandle, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(handle, method).remote(*arguments)
        except BackPressureError:
            raise self._overloaded() from None

    def _overloaded(self) -> Refusal:
        waiting = self._settings.grader.max_queued_requests + self._settings.grader.max_ongoing_requests
        seconds = max(_LEAST_RETRY_S, math.ceil(waiting * self._seconds_each))
        return Refusal(
            503,
            "overloaded",
            f"more photographs wait than can be graded soon; try again in {seconds} s",
            {"Retry-After": str(seconds)},
        )

    async def describe(self) -> ModelResponse:
        """The model as it runs now."""
        return await self._ask(self._grader, "describe")

    async def _model_version(self) -> str:
        return (await self.describe()).model_version

    async def _served(self) -> Served:
        bundle, model_version = await self._ask(self._grader, "served")
        return Served(bundle, model_version, self._settings.precision)

    async def is_ready(self) -> bool:
        """Whether the model answers in time."""
        try:
            await asyncio.wait_for(self._grader.check_health.remote(), _READY_TIMEOUT_S)
        except Exception:
            _log.warning("the model does not answer", exc_info=True)
            return False
        return True


def replica() -> Ingress:
    """The replica that this process is."""
    return ray_serve.get_replica_context().servable_object


Replica = Annotated[Ingress, Depends(replica)]


def read_photograph(data: bytes, preprocess: Preprocess) -> Photograph:
    """Decodes, hashes and measures the bytes of one photograph.

    Raises:
        ImageError: they cannot be decoded.
    """
    decoded = decode(data, preprocess)
    return Photograph(_sha256(data), decoded, quality.measure(decoded.pixels))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
