"""Clients of the grader and explainer, in other processes or in this one, with retries and backpressure."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import ray.exceptions
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import Decoded, Preprocess, decode
from serving.admission.decoding import Decoders
from serving.admission.limits import Load
from serving.http import request_context
from serving.http.problems import Refusal
from serving.observability.metrics import ImageMetrics
from serving.schemas.grading import Graded
from serving.settings import Scaling

# Requests of a replica that died are sent again: grading is idempotent.
_ATTEMPTS = 3
# The preprocessing of the model may change between two attempts.
_MAX_DECODES = 3

# Timeout of calls without a forward pass.
_TIMEOUT_S = 5.0

_log = logging.getLogger("ray.serve")


class DecodedImage(NamedTuple):
    """A decoded image for the model; `statistics` are float (K,) from `statistics.measure`."""

    sha256: str
    decoded: Decoded
    statistics: np.ndarray
    preprocess: Preprocess


def decode_image(data: bytes, preprocess: Preprocess) -> DecodedImage:
    """Decode, hash and measure one image file.

    Raises:
        ImageError: The file cannot be decoded.
    """
    decoded = decode(data, preprocess)
    return DecodedImage(hash_of(data), decoded, image_statistics.measure(decoded.pixels), preprocess)


def hash_of(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class LocalHandle:
    """Call an object of this process as by the handle of its deployment, with the same limits.

    Args:
        target: The object.
        scaling: Settings of the deployment, for its limits of calls that run and that wait.
    """

    def __init__(self, target: object, scaling: Scaling) -> None:
        self._target = target
        self._slots = asyncio.Semaphore(scaling.max_ongoing_requests)
        self._max_waiting = scaling.max_queued_requests
        self._waiting = 0

    def options(self, **_: object) -> LocalHandle:
        """Options of a `DeploymentHandle`, which concern calls to other processes."""
        return self

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=partial(self._call, method))

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._slots.locked() and self._waiting >= self._max_waiting:
            raise BackPressureError(num_queued_requests=self._waiting, max_queued_requests=self._max_waiting)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            return await getattr(self._target, method)(*arguments)
        finally:
            self._slots.release()


Handle: TypeAlias = DeploymentHandle | LocalHandle


class DeploymentClient:
    """Client of a deployment that retries after the death of a replica, and refuses requests on a full queue.

    Args:
        load: Load of the replica, for the Retry-After of refusals.
    """

    def __init__(self, handle: Handle, load: Load) -> None:
        # By value over gRPC: by reference, images above 100 KB would pass through Ray's object store.
        self._handle = handle.options(_by_reference=False)
        self._load = load

    async def call_with_timeout(self, method: str, *arguments: Any) -> Any:
        """Call a method that needs no forward pass.

        Raises:
            Refusal: The queue is full, or no replica answers within seconds.
        """
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self.call(method, *arguments)
        except TimeoutError:
            raise Refusal(
                503,
                "not_ready",
                f"the model does not answer within {_TIMEOUT_S:g} s; try again in a few seconds",
            ) from None

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of a replica.

        Raises:
            Refusal: The queue is full.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._call_once(method, *arguments)
            except ray.exceptions.RayActorError:
                _log.warning("a replica died, its request is sent again")
        return await self._call_once(method, *arguments)

    async def _call_once(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except BackPressureError:
            raise self._load.overloaded() from None


class GraderClient(DeploymentClient):
    """Client of a `Grader` deployment; decodes images with the preprocessing of its model."""

    def __init__(self, handle: Handle, load: Load, metrics: ImageMetrics, decoders: Decoders) -> None:
        super().__init__(handle, load)
        self._metrics = metrics
        self._decoders = decoders
        self._preprocess: Preprocess | None = None

    async def find_cached(self, sha256: str) -> tuple[Graded, tuple[str, ...]] | None:
        """Answer to an image that the owner of the request sent before; see `Grader.find_cached`."""
        answer: tuple[Graded, tuple[str, ...]] | None = await self.call(
            "find_cached", sha256, request_context.current().owner
        )
        return answer

    async def grade(
        self, data: bytes, cost: float = 0.0, image: DecodedImage | None = None
    ) -> tuple[DecodedImage, Graded]:
        """Decode and grade one image.

        Args:
            data: Bytes of the file.
            cost: Decoding cost, see `codecs.Header`.
            image: The image as decoded for another model; decoded again if the preprocessing differs.

        Raises:
            ImageError: The file cannot be decoded.
            Refusal: The queue is full, or the model is changing.
        """
        owner = request_context.current().owner
        with self._load.grading():
            preprocess = self._preprocess or await self.call("preprocess")
            for _ in range(_MAX_DECODES):
                if image is None or image.preprocess != preprocess:
                    with self._metrics.stage("decode"):
                        image = await self._decoders.run(owner, cost, decode_image, data, preprocess)
                pixels, statistics = image.decoded.pixels, image.statistics
                result = await self.call(
                    "grade", pixels, statistics, preprocess, owner, image.sha256, tuple(image.decoded.notes)
                )
                if isinstance(result, Graded):
                    self._preprocess = preprocess
                    return image, result
                preprocess = result
            raise Refusal(503, "model_changes", "the model is changing; try again in a few seconds")
