"""A deployment of graders, as an ingress asks it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any, NamedTuple

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
from serving.schemas.messages import Graded

# A replica that died took its requests with it. The same image has the same grade, so it is sent again.
_ATTEMPTS = 3
# The model may change its way in between two attempts, but not for ever.
_REMAKES = 3

# For what a grader knows without a forward pass.
_SOON_S = 5.0

_log = logging.getLogger("ray.serve")


class DecodedImage(NamedTuple):
    """An image on its way to the model; `statistics` are float (K,) from `statistics.measure`."""

    sha256: str
    decoded: Decoded
    statistics: np.ndarray
    preprocess: Preprocess


def decode_image(data: bytes, preprocess: Preprocess) -> DecodedImage:
    """Decodes, hashes and measures the bytes of one image.

    Raises:
        ImageError: they cannot be decoded.
    """
    decoded = decode(data, preprocess)
    return DecodedImage(hash_of(data), decoded, image_statistics.measure(decoded.pixels), preprocess)


def hash_of(data: bytes) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class DeploymentClient:
    """A deployment whose dead replicas cost no request, and whose full queue is a refusal.

    Args:
        handle: of the deployment.
        load: says when whoever is refused may come again.
    """

    def __init__(self, handle: DeploymentHandle, load: Load) -> None:
        # By value over gRPC: by reference each image, above Ray's 100 KB, would pass through the store.
        self._handle = handle.options(_by_reference=False)
        self._load = load

    async def call_with_timeout(self, method: str, *arguments: Any) -> Any:
        """Calls a method that needs no forward pass.

        Raises:
            Refusal: too many wait, or no replica answers within seconds.
        """
        try:
            async with asyncio.timeout(_SOON_S):
                return await self.call(method, *arguments)
        except TimeoutError:
            raise Refusal(
                503,
                "not_ready",
                f"the model does not answer within {_SOON_S:g} s; try again in a few seconds",
            ) from None

    async def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of some replica.

        Raises:
            Refusal: too many wait.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return await self._call_once(method, *arguments)
            except ray.exceptions.RayActorError:
                _log.warning("a replica died with a request, which is sent again")
        return await self._call_once(method, *arguments)

    async def _call_once(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except BackPressureError:
            raise self._load.overloaded() from None


class GraderClient(DeploymentClient):
    """A deployment of `Grader`; images are made as its model takes them."""

    def __init__(
        self, handle: DeploymentHandle, load: Load, metrics: ImageMetrics, decoders: Decoders
    ) -> None:
        super().__init__(handle, load)
        self._metrics = metrics
        self._decoders = decoders
        self._preprocess: Preprocess | None = None

    async def grade(self, data: bytes, cost: float = 0.0) -> tuple[DecodedImage, Graded]:
        """Grades the bytes of one image.

        Args:
            data: of the file.
            cost: of decoding it, see `codecs.Header`.

        Raises:
            ImageError: they cannot be decoded.
            Refusal: too many wait, or the model changes.
        """
        with self._load.grading():
            return await self._grade(data, cost)

    async def grade_decoded(self, image: DecodedImage, data: bytes, cost: float = 0.0) -> Graded:
        """Grades an image that was decoded for another model; again only if this one takes others.

        Raises:
            Refusal: as `grade`.
        """
        with self._load.grading():
            _, graded = await self._grade(data, cost, image)
        return graded

    async def _grade(
        self, data: bytes, cost: float, image: DecodedImage | None = None
    ) -> tuple[DecodedImage, Graded]:
        preprocess = self._preprocess or await self.call("preprocess")
        owner = request_context.current().owner
        for _ in range(_REMAKES):
            if image is None or image.preprocess != preprocess:
                image = await self._read(data, cost, preprocess)
            pixels, statistics = image.decoded.pixels, image.statistics
            found = await self.call("grade", pixels, statistics, preprocess, owner)
            if isinstance(found, Graded):
                self._preprocess = preprocess
                return image, found
            preprocess = found
        raise Refusal(503, "model_changes", "the model is being changed; try again in a few seconds")

    async def _read(self, data: bytes, cost: float, preprocess: Preprocess) -> DecodedImage:
        with self._metrics.stage("decode"):
            owner = request_context.current().owner
            return await self._decoders.run(owner, cost, decode_image, data, preprocess)
