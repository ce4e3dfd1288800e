"""The replica that meets the network: it decodes, asks the grader, and words the answer."""

from __future__ import annotations

import asyncio
import hashlib
import logging

from ray.serve.handle import DeploymentHandle

from scalp_core.bundle import BundleSpec
from scalp_core.preprocess import Decoded, decode
from serving.schemas import GradeResponse, ModelResponse

_READY_TIMEOUT_S = 5

_log = logging.getLogger("ray.serve")


class Ingress:
    """Grades photographs one at a time.

    Args:
        grader: handle of the `Grader` deployment.
        spec: contract of the bundle that the grader holds.
        model_version: what answers are signed with.
    """

    def __init__(self, grader: DeploymentHandle, spec: BundleSpec, model_version: str) -> None:
        self._grader = grader
        self._spec = spec
        self._model_version = model_version

    async def grade(self, data: bytes) -> GradeResponse:
        """Grades the bytes of one photograph.

        Raises:
            ImageError: they cannot be decoded.
        """
        sha256, decoded = await asyncio.to_thread(self._decode, data)
        grading = await self._grader.grade.remote(decoded.pixels)
        return GradeResponse.of(sha256, decoded.notes, grading, self._model_version)

    def _decode(self, data: bytes) -> tuple[str, Decoded]:
        return hashlib.sha256(data).hexdigest(), decode(data, self._spec.preprocess)

    async def describe(self) -> ModelResponse:
        """The model as it runs now."""
        return await self._grader.describe.remote()

    async def is_ready(self) -> bool:
        """Whether the model answers in time."""
        try:
            await asyncio.wait_for(self._grader.check_health.remote(), _READY_TIMEOUT_S)
        except Exception:
            _log.warning("the model does not answer", exc_info=True)
            return False
        return True
