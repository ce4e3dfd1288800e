"""The replica that meets the network: it decodes, asks the grader, and words the answer."""

from __future__ import annotations

import asyncio
import hashlib
import logging

import numpy as np
from ray.serve.handle import DeploymentHandle

from scalp_core.bundle import BundleSpec
from scalp_core.preprocess import decode
from serving.schemas import GradeResponse, ModelResponse

_READY_TIMEOUT_S = 5

_log = logging.getLogger("ray.serve")


class Ingress:
    """Grades photographs one at a time.

    Args:
        grader: handle of the `Grader` deployment.
        spec: contract of the bundle that the grader holds.
    """

    def __init__(self, grader: DeploymentHandle, spec: BundleSpec) -> None:
        self._grader = grader
        self._spec = spec

    async def grade(self, data: bytes) -> GradeResponse:
        """Grades the bytes of one photograph.

        Raises:
            ImageError: they cannot be decoded.
        """
        sha256, image = await asyncio.to_thread(self._decode, data)
        grading = await self._grader.grade.remote(image)
        return GradeResponse.of(sha256, grading, self._spec.model_version)

    def _decode(self, data: bytes) -> tuple[str, np.ndarray]:
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
