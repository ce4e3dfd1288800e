"""Grader deployment: holds the model and grades images in dynamic batches."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from opentelemetry.trace import Span

from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import resolve
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.inference.predictor import Predictor
from scalp_core.results.schema import Signature
from serving.admission.fairness import LOCAL_OWNER, ActiveOwners, FairQueue
from serving.observability.metrics import GraderMetrics
from serving.observability.tracing import current_span, record_past_stage
from serving.replicas.answer_cache import AnswerCache, CachedAnswer
from serving.schemas.grading import Graded, ModelResponse
from serving.settings import ModelSettings, Settings, check_batching

# While several owners sent requests within this time, none gets all lanes.
_ACTIVE_S = 30.0
# A pass that ended within this time proves that the model works. Ray checks every 10 s.
_PASS_PROVES_S = 9.0

_log = logging.getLogger("ray.serve")


@dataclass
class _Waiting:
    """An image that waits for the model."""

    image: np.ndarray
    statistics: np.ndarray
    preprocess: Preprocess
    answer: asyncio.Future[Graded | Preprocess]
    since: float
    owner: str
    sha256: str
    notes: tuple[str, ...]
    span: Span | None  # that recorded spans belong to


class _Pass(NamedTuple):
    """A forward pass that runs."""

    lanes: int
    since: float
    owners: frozenset[str]


@dataclass(frozen=True)
class _Model:
    """The current model, with all threads in one pass or one pass per lane."""

    predictor: Predictor
    signature: Signature
    in_lanes: Predictor | None
    lanes: int
    spec: BundleSpec  # contract of the bundle with the thresholds of the settings
    bundle: str
    settings: ModelSettings
    cache: AnswerCache


class Grader:
    """Grade decoded images; one forward pass takes all images that wait when the model is free.

    A single request runs immediately, and images that arrive during its pass form the next batch.
    `ray.serve.batch` is not used: it closes a batch after a fixed wait, even when the model is busy, so that
    under load the queued batches hold one or two images each.

    On CPUs a single image gets all threads. With as many images as threads, each thread is a lane with
    separate passes: threads of one pass wait for each other when the ingress takes a core from one.

    Owners (see `admission.fairness`) take turns. While several are active, none has passes in all lanes, so
    that images of another owner do not wait for a full pass.

    Ray calls `reconfigure` with the `user_config` before the replica is ready, and when it changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Separate threads keep the event loop free, and PyTorch's thread count is set per thread.
        self._cores = settings.threads or max(1, int(settings.grader.cpus))
        self._threads = ThreadPoolExecutor(self._cores, "model")
        self._model: _Model | None = None
        self._waiting: FairQueue[_Waiting] = FairQueue()
        self._active = ActiveOwners(_ACTIVE_S)
        self._passes: dict[asyncio.Task[None], _Pass] = {}
        self._loading: asyncio.Task[None] | None = None
        self._load_error: str | None = None
        self._pass_ended_at = -math.inf
        self._failed: str | None = None  # error of the last health check
        self._metrics = GraderMetrics()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply `ModelSettings`.

        The first model is loaded and warm when this returns. A later model is loaded in parallel, while the
        current one grades. If it cannot be loaded, the current model stays and `describe` has the error: a
        mistyped name must not end a working service.

        Raises:
            ValueError: The settings are invalid, or do not fit those of the deployment.
            UserError: The first bundle cannot be loaded.
        """
        settings = ModelSettings.model_validate(user_config)
        check_batching(settings, self._settings.grader.max_ongoing_requests)
        if self._loading:
            self._loading.cancel()
        if self._model is None:
            await self._set_model(settings)
        else:
            self._loading = asyncio.create_task(self._replace(settings))

    async def _replace(self, settings: ModelSettings) -> None:
        try:
            await self._set_model(settings)
        except Exception as error:
            self._load_error = str(error).splitlines()[0]
            _log.error("%s cannot be loaded, the current model stays: %s", settings.bundle, error)

    async def _set_model(self, settings: ModelSettings) -> None:
        self._model = await asyncio.to_thread(self._load, settings)
        self._metrics.set_model(self._model.predictor)
        self._load_error = None

    def _load(self, settings: ModelSettings) -> _Model:
        endpoint, current = self._settings, self._model
        uri = storage.absolute(resolve(settings.bundle))
        if current and current.bundle == uri:
            predictor, in_lanes, lanes = current.predictor, current.in_lanes, current.lanes
        else:
            predictor = Predictor(
                load_bundle(uri), endpoint.device, endpoint.precision, self._cores, endpoint.runtime
            )
            lanes = self._cores if predictor.runtime == "openvino" else 1
            in_lanes = predictor.in_streams(lanes) if lanes > 1 else None
        predictor.warm_up(settings.max_batch_size)
        if in_lanes:
            in_lanes.warm_up(settings.max_batch_size)
        signature = Signature(predictor.model_version, predictor.computed_by)
        spec = _with_thresholds(predictor.spec, settings)
        cache = AnswerCache(endpoint.cache_mib)
        return _Model(predictor, signature, in_lanes, lanes, spec, uri, settings, cache)

    async def find_cached(self, sha256: str, owner: str) -> tuple[Graded, tuple[str, ...]] | None:
        """Answer of the current model to an image that `owner` sent before, with its notes, if it is kept.

        It counts in the metrics like a graded image, but not as a pass: its batch size is 0.
        """
        model = self._current()
        answer = model.cache.get(owner, sha256)
        self._metrics.observe_lookup(is_hit=answer is not None)
        if answer is None:
            return None
        self._metrics.observe_gradings([answer.grading], [answer.statistics])
        return Graded(answer.grading, model.signature, model.bundle, 0, 0.0, 0.0), answer.notes

    async def grade(
        self,
        image: np.ndarray,
        statistics: np.ndarray,
        preprocess: Preprocess,
        owner: str = LOCAL_OWNER,
        sha256: str = "",
        notes: tuple[str, ...] = (),
    ) -> Graded | Preprocess:
        """Grade one image.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            statistics: float (K,) of the image, from `statistics.measure`.
            sha256: Hash of the file, for the cache of answers; not kept if it is empty.
            notes: Notes of the decoding, for the cache.

        Returns:
            The grading; or the preprocessing of the model, if it differs from that of the image.
        """
        answer: asyncio.Future[Graded | Preprocess] = asyncio.get_running_loop().create_future()
        self._active.record(owner)
        since = time.monotonic()
        waiting = _Waiting(image, statistics, preprocess, answer, since, owner, sha256, notes, current_span())
        self._waiting.push(owner, waiting)
        self._start_passes()
        return await answer

    def _start_passes(self) -> None:
        """Start the passes that are due; called when an image arrives and when a pass ends."""
        model = self._current()
        # Share per lane, including busy ones: otherwise the first lane takes all images.
        share = math.ceil(len(self._waiting) / model.lanes)
        while True:
            full = self._owners_with_all_lanes(model)
            count = self._waiting.count(without=full)
            free = model.lanes - sum(running.lanes for running in self._passes.values())
            if not free or not count:
                return
            is_alone = free == model.lanes and count < free
            size = min(count if is_alone else share, model.settings.max_batch_size, count)
            batch = [self._waiting.pop(without=full) for _ in range(size)]
            lanes = model.lanes if is_alone or model.in_lanes is None else 1
            task = asyncio.create_task(self._run_pass(model, batch, lanes))
            owners = frozenset(waiting.owner for waiting in batch)
            self._passes[task] = _Pass(lanes, time.monotonic(), owners)
            task.add_done_callback(self._pass_ended)

    def _owners_with_all_lanes(self, model: _Model) -> set[str]:
        """Owners that hold their maximum of lanes: all but one while several owners are active."""
        if model.lanes == 1 or len(self._active) < 2:
            return set()
        lanes: Counter[str] = Counter()
        for running in self._passes.values():
            lanes.update(dict.fromkeys(running.owners, running.lanes))
        return {owner for owner, held in lanes.items() if held >= model.lanes - 1}

    def _pass_ended(self, task: asyncio.Task[None]) -> None:
        del self._passes[task]
        self._start_passes()

    async def _run_pass(self, model: _Model, batch: list[_Waiting], lanes: int) -> None:
        # Images for the previous model, whose preprocessing differs, are returned.
        for waiting in batch:
            if waiting.preprocess != model.spec.preprocess and not waiting.answer.done():
                waiting.answer.set_result(model.spec.preprocess)
        batch = [waiting for waiting in batch if not waiting.answer.done()]  # without disconnected clients
        if not batch:
            return
        predictor = model.in_lanes if model.in_lanes and lanes == 1 else model.predictor
        loop, started = asyncio.get_running_loop(), time.monotonic()
        try:
            gradings = await loop.run_in_executor(self._threads, _grade, predictor, model.spec, batch)
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        self._pass_ended_at, self._failed = time.monotonic(), None
        seconds = self._pass_ended_at - started
        for waiting, grading in zip(batch, gradings, strict=True):
            answer = CachedAnswer(grading, waiting.notes, waiting.statistics)
            model.cache.put(waiting.owner, waiting.sha256, answer)
            record_past_stage(waiting.span, "queue", waiting.since, started)
            record_past_stage(waiting.span, "forward", started, self._pass_ended_at, batch_size=len(batch))
            if not waiting.answer.done():
                waiting.answer.set_result(
                    Graded(
                        grading,
                        model.signature,
                        model.bundle,
                        len(batch),
                        started - waiting.since,
                        seconds,
                    )
                )
        self._metrics.observe_batch(
            [started - waiting.since for waiting in batch], model.settings.max_batch_size, seconds
        )
        self._metrics.observe_gradings(gradings, [waiting.statistics for waiting in batch])

    def _current(self) -> _Model:
        if self._model is None:
            raise UserError("the grader has no model; set bundle in the user_config of the deployment Grader")
        return self._model

    async def describe(self) -> ModelResponse:
        """Describe the model and how it runs here."""
        model = self._current()
        return ModelResponse.of(model.spec, model.predictor, self._load_error)

    async def served(self) -> tuple[str, str]:
        """Location of the current bundle with a pinned version, and its model version."""
        model = self._current()
        return model.bundle, model.predictor.model_version

    async def preprocess(self) -> Preprocess:
        """Preprocessing of the current model."""
        return self._current().spec.preprocess

    async def check_health(self) -> None:
        """Run the model on a blank image unless it has graded recently; Ray replaces a replica that fails.

        Raises:
            RuntimeError: A forward pass hangs or fails.
        """
        self._metrics.publish(len(self._waiting))
        model = self._current()
        self._check_passes()
        if time.monotonic() - self._pass_ended_at < _PASS_PROVES_S:
            return
        loop, allowed = asyncio.get_running_loop(), self._settings.wedged_seconds
        try:
            await asyncio.wait_for(loop.run_in_executor(self._threads, model.predictor.warm_up, 1), allowed)
        except Exception as error:
            self._failed = f"the model did not grade a blank image: {error or type(error).__name__}"
            raise RuntimeError(self._failed) from error
        self._failed = None

    async def check_ready(self) -> None:
        """Check the result of the last `check_health`, without a forward pass: the route needs no key.

        Raises:
            RuntimeError: A forward pass hangs, or the last check failed.
        """
        self._current()
        self._check_passes()
        if self._failed:
            raise RuntimeError(self._failed)

    def _check_passes(self) -> None:
        if self._passes:
            seconds = time.monotonic() - min(running.since for running in self._passes.values())
            if seconds > self._settings.wedged_seconds:
                raise RuntimeError(f"a forward pass hangs for {seconds:.0f} s")


def _grade(predictor: Predictor, spec: BundleSpec, batch: list[_Waiting]) -> list[Grading]:
    """Grade a batch, on a thread of the model."""
    logits = predictor.logits(np.stack([waiting.image for waiting in batch]))
    return make_gradings(logits, np.stack([waiting.statistics for waiting in batch]), spec)


def _with_thresholds(spec: BundleSpec, settings: ModelSettings) -> BundleSpec:
    thresholds = settings.model_dump(include={"max_set_size", "min_confidence"}, exclude_none=True)
    return spec.model_copy(update={"referral": spec.referral.model_copy(update=thresholds)})
