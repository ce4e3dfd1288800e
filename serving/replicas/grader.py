"""The replica that holds the model, and how requests share its forward passes."""

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

from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import resolve
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.inference.predictor import Predictor, resolve_device, resolve_runtime
from scalp_core.results.schema import Signature
from serving.admission.fairness import LOCAL_OWNER, ActiveOwners, FairQueue
from serving.observability.metrics import GraderMetrics
from serving.schemas.grading import ModelResponse
from serving.schemas.messages import Graded
from serving.settings import ModelSettings, Settings, check_batching

# While one owner asked within this time, no other has passes in all lanes.
_ACTIVE_S = 30.0
# A pass that ended within this time shows that the model works. Ray checks every 10 s.
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


class _Pass(NamedTuple):
    """A forward pass that runs."""

    lanes: int
    since: float
    owners: frozenset[str]


@dataclass(frozen=True)
class _Model:
    """What answers at present: all threads in one pass, or a pass in each of several lanes."""

    predictor: Predictor
    signature: Signature
    in_lanes: Predictor | None
    lanes: int
    spec: BundleSpec  # the bundle's, with the thresholds of the settings
    bundle: str
    settings: ModelSettings


class Grader:
    """Grades decoded images, as many in one forward pass as are waiting when the model is free.

    Nobody waits for company: a lone request runs at once, and what comes in meanwhile is the next batch.
    `ray.serve.batch` is not used: it closes a batch after a fixed wait, whether the model is free or not, so
    that under load the batches that queue for the model hold one or two images each.

    On CPUs a lone image gets all threads; when there are as many as threads, each thread is a lane with
    passes of its own. Threads of one pass wait for each other whenever the ingress takes a core from one.

    Owners (see `fairness`) are served in rotation. While several ask, none has passes in all lanes, so that a
    image of another need not wait for a full pass.

    Ray calls `reconfigure` with the `user_config` before the replica is ready, and again when it changes.

    Args:
        settings: of the endpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Threads of its own: the event loop stays free, and PyTorch's thread count is set where it counts.
        self._threads = ThreadPoolExecutor(self._most_lanes(), "model")
        self._model: _Model | None = None
        self._waiting: FairQueue[_Waiting] = FairQueue()
        self._active = ActiveOwners(_ACTIVE_S)
        self._passes: dict[asyncio.Task[None], _Pass] = {}
        self._company: asyncio.TimerHandle | None = None
        self._loading: asyncio.Task[None] | None = None
        self._load_error: str | None = None
        self._pass_ended_at = -math.inf
        self._failed: str | None = None  # why the last check of the model failed
        self._metrics = GraderMetrics()

    def _most_lanes(self) -> int:
        own = self._settings
        if resolve_device(own.device) == "cuda" or resolve_runtime(own.runtime, "cpu") != "openvino":
            return 1
        return own.threads or max(1, int(own.grader.cpus))

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
            self._metrics.set_model(self._model.predictor)
            return
        self._loading = asyncio.create_task(self._replace(settings))

    async def _replace(self, settings: ModelSettings) -> None:
        try:
            self._model = await asyncio.to_thread(self._load, settings)
            self._metrics.set_model(self._model.predictor)
            self._load_error = None
        except Exception as error:
            self._load_error = str(error).splitlines()[0]
            _log.error("%s cannot be loaded, the model before it stays: %s", settings.bundle, error)

    def _load(self, settings: ModelSettings) -> _Model:
        own, now = self._settings, self._model
        uri = storage.absolute(resolve(settings.bundle))
        lanes = self._most_lanes()
        if now and now.bundle == uri:
            predictor, in_lanes = now.predictor, now.in_lanes
        else:
            threads = own.threads or max(1, int(own.grader.cpus))
            arguments = load_bundle(uri), own.device, own.precision, threads, own.runtime
            predictor = Predictor(*arguments)
            in_lanes = Predictor(*arguments, streams=lanes) if lanes > 1 else None
        predictor.warm_up(settings.max_batch_size)
        if in_lanes:
            in_lanes.warm_up(settings.max_batch_size)
        signature = Signature(predictor.model_version, predictor.computed_by)
        return _Model(
            predictor, signature, in_lanes, lanes, _with_thresholds(predictor.spec, settings), uri, settings
        )

    async def grade(
        self, image: np.ndarray, statistics: np.ndarray, preprocess: Preprocess, owner: str = LOCAL_OWNER
    ) -> Graded | Preprocess:
        """Grades one image.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            statistics: float (K,) of it from `statistics.measure`.
            preprocess: that made it.
            owner: whose turn it takes.

        Returns:
            the answer; or, if the model takes images that are made otherwise, how.
        """
        answer: asyncio.Future[Graded | Preprocess] = asyncio.get_running_loop().create_future()
        self._active.record(owner)
        self._waiting.push(owner, _Waiting(image, statistics, preprocess, answer, time.monotonic(), owner))
        self._start_passes()
        return await answer

    def _start_passes(self) -> None:
        """Called whenever an image comes or a pass ends."""
        model = self._current()
        # Of each lane, also of those that are busy: if the first one took all, the next would find nobody.
        share = math.ceil(len(self._waiting) / model.lanes)
        while True:
            full = self._owners_with_all_lanes(model)
            count, most = self._waiting.count(without=full), model.settings.max_batch_size
            free = model.lanes - sum(each.lanes for each in self._passes.values())
            if not free or not count:
                return
            oldest = min(each.since for each in self._waiting.heads())
            wait = oldest + model.settings.batch_wait_ms / 1000 - time.monotonic()
            if count < most and wait > 0:
                if not self._company:
                    self._company = asyncio.get_running_loop().call_later(wait, self._company_is_late)
                return
            alone = free == model.lanes and count < free
            size = min(count if alone else share, most, count)
            batch = [self._waiting.pop(without=full) for _ in range(size)]
            lanes = model.lanes if alone or model.in_lanes is None else 1
            task = asyncio.create_task(self._run_pass(model, batch, lanes))
            owners = frozenset(each.owner for each in batch)
            self._passes[task] = _Pass(lanes, time.monotonic(), owners)
            task.add_done_callback(self._pass_ended)

    def _owners_with_all_lanes(self, model: _Model) -> set[str]:
        """Owners with passes in all the lanes that they may have: all but one where others ask too."""
        if model.lanes == 1 or len(self._active) < 2:
            return set()
        lanes: Counter[str] = Counter()
        for each in self._passes.values():
            lanes.update(dict.fromkeys(each.owners, each.lanes))
        return {owner for owner, held in lanes.items() if held >= model.lanes - 1}

    def _company_is_late(self) -> None:
        self._company = None
        self._start_passes()

    def _pass_ended(self, task: asyncio.Task[None]) -> None:
        del self._passes[task]
        self._start_passes()

    async def _run_pass(self, model: _Model, batch: list[_Waiting], lanes: int) -> None:
        # Made for the model before this one: its way in changed meanwhile.
        for each in batch:
            if each.preprocess != model.spec.preprocess and not each.answer.done():
                each.answer.set_result(model.spec.preprocess)
        batch = [each for each in batch if not each.answer.done()]  # and its client may have gone
        if not batch:
            return
        predictor = model.in_lanes if model.in_lanes and lanes == 1 else model.predictor
        loop, started = asyncio.get_running_loop(), time.monotonic()
        try:
            found = await loop.run_in_executor(self._threads, _grade, predictor, model.spec, batch)
        except Exception as error:
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        self._pass_ended_at, self._failed = time.monotonic(), None
        seconds = self._pass_ended_at - started
        for each, grading in zip(batch, found, strict=True):
            if not each.answer.done():
                each.answer.set_result(
                    Graded(
                        grading,
                        model.signature,
                        model.bundle,
                        len(batch),
                        started - each.since,
                        seconds,
                    )
                )
        self._metrics.observe_batch(
            [started - each.since for each in batch], model.settings.max_batch_size, seconds
        )
        self._metrics.observe_gradings(found, [each.statistics for each in batch])

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

    async def served(self) -> tuple[str, str]:
        """Where the bundle that answers is, its version pinned; and what it signs with."""
        model = self._current()
        return model.bundle, model.predictor.model_version

    async def preprocess(self) -> Preprocess:
        """How images are made for the model."""
        return self._current().spec.preprocess

    async def check_health(self) -> None:
        """Runs the model on a blank image if it graded none lately; Ray replaces a replica that fails.

        Raises:
            RuntimeError: a forward pass does not end, or fails.
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
        """As the last `check_health` found it; without a forward pass, as anybody may ask.

        Raises:
            RuntimeError: a forward pass does not end, or the last check failed.
        """
        self._current()
        self._check_passes()
        if self._failed:
            raise RuntimeError(self._failed)

    def _check_passes(self) -> None:
        if self._passes:
            seconds = time.monotonic() - min(each.since for each in self._passes.values())
            if seconds > self._settings.wedged_seconds:
                raise RuntimeError(f"a forward pass runs for {seconds:.0f} s and does not end")


def _grade(predictor: Predictor, spec: BundleSpec, batch: list[_Waiting]) -> list[Grading]:
    """On a thread of the model."""
    logits = predictor.logits(np.stack([each.image for each in batch]))
    return make_gradings(logits, np.stack([each.statistics for each in batch]), spec)


def _with_thresholds(spec: BundleSpec, settings: ModelSettings) -> BundleSpec:
    chosen = settings.model_dump(include={"max_set_size", "min_confidence"}, exclude_none=True)
    return spec.model_copy(update={"referral": spec.referral.model_copy(update=chosen)})
