"""The replica that holds the model, and how requests share its forward passes."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalp_core.bundle import Bundle
from scalp_core.grading import Grading
from scalp_core.predictor import Device, Precision, Predictor, Runtime
from serving.schemas import ModelResponse


class Batching(BaseModel):
    """How many requests share a forward pass, and how many a replica takes in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: int = Field(16, ge=1, description="photographs in one forward pass")
    max_ongoing_requests: int = Field(64, ge=1, description="requests a replica holds; Ray queues the rest")

    @model_validator(mode="after")
    def _next_batch_can_fill(self) -> Batching:
        if self.max_ongoing_requests < 2 * self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) must be at least twice max_batch_size "
                f"({self.max_batch_size}), or no batch fills while the one before it runs (ray#43288)"
            )
        return self


class Grader:
    """Grades decoded photographs, as many in one forward pass as are waiting when the model is free.

    Nobody waits for company: a lone request runs at once, and what comes in meanwhile is the next batch.
    `ray.serve.batch` is not used: it closes a batch after a fixed wait, whether the model is free or not, so
    that under load the batches that queue for the model hold one or two photographs each.

    Args:
        bundle: reference to a loaded `Bundle`.
        device: where the model runs.
        precision: of the forward pass.
        threads: CPU threads of the forward pass.
        max_batch_size: photographs in one forward pass.
        runtime: what runs the model.
    """

    def __init__(
        self,
        bundle: ray.ObjectRef[Bundle],
        device: Device,
        precision: Precision,
        threads: int,
        max_batch_size: int,
        runtime: Runtime = "auto",
    ) -> None:
        # One thread of its own: the event loop stays free, and PyTorch's thread count is set where it counts.
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._predictor = Predictor(ray.get(bundle), device, precision, threads, runtime)
        self._max_batch_size = max_batch_size
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[Grading]]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._model_thread.submit(self._predictor.warm_up, max_batch_size).result()

    async def grade(self, image: np.ndarray) -> Grading:
        """Grades one photograph, uint8 (size, size, 3) from `preprocess.decode`."""
        answer: asyncio.Future[Grading] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        """Runs batches until nobody waits."""
        try:
            while self._waiting:
                size = min(len(self._waiting), self._max_batch_size)
                await self._run_batch([self._waiting.popleft() for _ in range(size)])
        finally:
            self._running = None

    async def _run_batch(self, batch: list[tuple[np.ndarray, asyncio.Future[Grading]]]) -> None:
        images, answers = zip(*batch, strict=True)
        loop = asyncio.get_running_loop()
        try:
            gradings = await loop.run_in_executor(
                self._model_thread, lambda: self._predictor.grade(np.stack(images))
            )
        except Exception as error:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        for answer, grading in zip(answers, gradings, strict=True):
            if not answer.done():  # its client may have gone
                answer.set_result(grading)

    async def describe(self) -> ModelResponse:
        """The model as it runs here."""
        return ModelResponse.of(self._predictor.spec, self._predictor.device, self._predictor.precision)

    async def check_health(self) -> None:
        """Runs the model on a blank photograph; Ray calls it and replaces a replica that does not answer."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._model_thread, self._predictor.warm_up, 1)
