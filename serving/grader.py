"""The replica that holds the model, and how requests share its forward passes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scalp_core import storage
from scalp_core.bundle import BundleSpec, load_bundle
from scalp_core.errors import UserError
from scalp_core.grading import Grading, gradings
from scalp_core.predictor import Predictor
from scalp_core.preprocess import Preprocess
from scalp_core.registry import resolve
from serving.schemas import ModelResponse
from serving.settings import ModelSettings, Settings, check_batching

_log = logging.getLogger("ray.serve")


class Graded(NamedTuple):
    """The answer for one photograph, and how it came about."""

    grading: Grading
    model_version: str
    bundle: str  # where it is, its version pinned
    batch_size: int
    queue_seconds: float
    forward_seconds: float


@dataclass
class _Waiting:
    """A photograph that waits for the model."""

    image: np.ndarray
    statistics: np.ndarray
    preprocess: Preprocess
    answer: asyncio.Future[Graded | Preprocess]
    since: float


@dataclass(frozen=True)
class _Model:
    """What answers at present."""

    predictor: Predictor
    spec: BundleSpec  # the bundle's, with the thresholds of the settings
    bundle: str
    settings: ModelSettings


class Grader:
    """Grades decoded photographs, as many in one forward pass as are waiting when the model is free.

    Nobody waits for company: a lone request runs at once, and what comes in meanwhile is the next batch.
    `ray.serve.batch` is not used: it closes a batch after a fixed wait, whether the model is free or not, so
    that under load the batches that queue for the model hold one or two photographs each.

    Ray calls `reconfigure` with the `user_config` before the replica is ready, and again when it changes.

    Args:
        settings: of the endpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # One thread of its own: the event loop stays free, and PyTorch's thread count is set where it counts.
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._model: _Model | None = None
        self._waiting: deque[_Waiting] = deque()
        self._running: asyncio.Task[None] | None = None
        self._company = asyncio.Event()
        self._pass_since: float | None = None
        self._loading: asyncio.Task[None] | None = None
        self._load_error: str | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Applies `ModelSettings`.

        The first model is loaded and warm when this returns. A later one is loaded beside the one that
        answers, which goes on until then; if it cannot be loaded, the one that answers stays, and `describe`
        says why: a mistyped name must not end a service that works.

        Raises:
            ValueError: the settings are wrong or do not go with those of the deployment.
            UserError: the first bundle cannot be had.
        """
        settings = ModelSettings.model_validate(user_config)
        check_batching(settings, self._settings.grader.max_ongoing_requests)
        if self._loading:
            self._loading.cancel()
        if self._model is None:
            self._model = await asyncio.to_thread(self._load, settings)
            return
        self._loading = asyncio.create_task(self._replace(settings))

    async def _replace(self, settings: ModelSettings) -> None:
        try:
            self._model = await asyncio.to_thread(self._load, settings)
            self._load_error = None
        except Exception as error:
            self._load_error = str(error).splitlines()[0]
            _log.error("%s cannot be loaded, the model before it stays: %s", settings.bundle, error)

    def _load(self, settings: ModelSettings) -> _Model:
        own, now = self._settings, self._model
        uri = storage.absolute(resolve(settings.bundle))
        if now and now.bundle == uri:
            predictor = now.predictor
        else:
            threads = own.threads or max(1, int(own.grader.cpus))
            predictor = Predictor(load_bundle(uri), own.device, own.precision, threads, own.runtime)
        predictor.warm_up(settings.max_batch_size)
        return _Model(predictor, _with_thresholds(predictor.spec, settings), uri, settings)

    async def grade(
        self, image: np.ndarray, statistics: np.ndarray, preprocess: Preprocess
    ) -> Graded | Preprocess:
        """Grades one photograph.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            statistics: float (K,) of it from `quality.measure`.
            preprocess: that made it.

        Returns:
            the answer; or, if the model takes photographs that are made otherwise, how.
        """
        answer: asyncio.Future[Graded | Preprocess] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(image, statistics, preprocess, answer, time.monotonic()))
        self._company.set()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        """Runs batches until nobody waits."""
        try:
            while self._waiting:
                model = self._current()
                await self._wait_for_company(model.settings)
                size = min(len(self._waiting), model.settings.max_batch_size)
                await self._run_batch(model, [self._waiting.popleft() for _ in range(size)])
        finally:
            self._running = None

    async def _wait_for_company(self, settings: ModelSettings) -> None:
        until = self._waiting[0].since + settings.batch_wait_ms / 1000
        while len(self._waiting) < settings.max_batch_size and (left := until - time.monotonic()) > 0:
            self._company.clear()
            try:
                await asyncio.wait_for(self._company.wait(), left)
            except TimeoutError:
                return

    async def _run_batch(self, model: _Model, batch: list[_Waiting]) -> None:
        # Made for the model before this one: its way in changed meanwhile.
        for each in batch:
            if each.preprocess != model.spec.preprocess and not each.answer.done():
                each.answer.set_result(model.spec.preprocess)
        batch = [each for each in batch if not each.answer.done()]  # and its client may have gone
        if not batch:
            return
        loop = asyncio.get_running_loop()
        self._pass_since = started = time.monotonic()
        try:
            found = await loop.run_in_executor(self._model_thread, _grade, model, batch)
        except Exception as error:
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        finally:
            self._pass_since = None
        seconds = time.monotonic() - started
        for each, grading in zip(batch, found, strict=True):
            if not each.answer.done():
                each.answer.set_result(
                    Graded(
                        grading,
                        model.predictor.model_version,
                        model.bundle,
                        len(batch),
                        started - each.since,
                        seconds,
                    )
                )

    def _current(self) -> _Model:
        if self._model is None:
            raise UserError(
                "the grader has no model: set user_config of the deployment Grader, with the key bundle"
            )
        return self._model

    async def describe(self) -> ModelResponse:
        """The model as it runs here."""
        model = self._current()
        return ModelResponse.of(model.spec, model.predictor, self._load_error)

    async def preprocess(self) -> Preprocess:
        """How photographs are made for the model."""
        return self._current().spec.preprocess

    async def check_health(self) -> None:
        """Runs the model on a blank photograph; Ray calls it and replaces a replica that fails.

        Raises:
            RuntimeError: a forward pass does not end.
        """
        model, since = self._current(), self._pass_since
        if since is not None and time.monotonic() - since > self._settings.wedged_seconds:
            raise RuntimeError(f"a forward pass runs for {time.monotonic() - since:.0f} s and does not end")
        loop = asyncio.get_running_loop()
        check = loop.run_in_executor(self._model_thread, model.predictor.warm_up, 1)
        await asyncio.wait_for(check, self._settings.wedged_seconds)


def _grade(model: _Model, batch: list[_Waiting]) -> list[Grading]:
    """On the model's thread."""
    logits = model.predictor.logits(np.stack([each.image for each in batch]))
    return gradings(logits, np.stack([each.statistics for each in batch]), model.spec)


def _with_thresholds(spec: BundleSpec, settings: ModelSettings) -> BundleSpec:
    chosen = settings.model_dump(include={"max_set_size", "min_confidence"}, exclude_none=True)
    return spec.model_copy(update={"referral": spec.referral.model_copy(update=chosen)})
