"""Prometheus metrics of the endpoint; Ray's agent of each node exports them as `ray_scalp_…`.

An observation takes a microsecond; processes send their metrics to the agent every ten seconds. The agent
keeps the buckets of a histogram and estimates its `_sum` from their centers, so dashboards compute means from
counters. docs/serving.md lists the metrics, cluster/dashboards shows them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalp_core.inference.decision import Grading
from scalp_core.inference.predictor import Predictor
from scalp_core.results.drift import Level
from serving.http import request_context
from serving.observability.drift import DriftWindow

Stage = Literal["read", "decode", "queue", "forward", "heatmap"]

# Bucket bounds in seconds, closest between 10 ms and 1 s.
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75]
_SECONDS += [1, 1.5, 2, 3, 5, 10, 30, 60]
_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_UNLIKENESS = [0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5]
_LEVELS: dict[Level, int] = {"too_few": -1, "none": 0, "some": 1, "strong": 2}


class ImageMetrics:
    """Durations of the stages of an image in a replica, and unreadable images."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "scalp_stage_seconds", "an image's time in a stage", boundaries=_SECONDS, tag_keys=("stage",)
        )
        self._unreadable = Counter("scalp_unreadable", "images that cannot be decoded", ("code",))

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """Record the duration of a stage of one image, or for `forward` of one pass."""
        self._seconds.observe(seconds, {"stage": stage})

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Record the duration of the block, unless it fails."""
        started = time.perf_counter()
        yield
        self.observe_stage(stage, time.perf_counter() - started)

    def observe_unreadable(self, code: str) -> None:
        """Count an image that was refused.

        Args:
            code: Code of its `ImageError`.
        """
        self._unreadable.inc(1, {"code": code})


class RequestMetrics:
    """Metrics of the requests of one ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "scalp_requests", "requests by their end: ok or a problem's code", ("path", "status", "outcome")
        )
        self._seconds = Histogram(
            "scalp_request_seconds", "from its first byte to the answer's last", _SECONDS, ("path",)
        )

    def observe(self, path: str, status: int, outcome: str, seconds: float) -> None:
        """Record one request.

        Args:
            path: Path template of the route, not the path of the request.
            status: Status of the response.
            outcome: `ok`, or the code of the problem.
            seconds: Duration of the request.
        """
        self._requests.inc(1, {"path": path, "status": str(status), "outcome": outcome})
        self._seconds.observe(seconds, {"path": path})


class GraderMetrics:
    """Metrics of the passes, grades and drift of one grader replica."""

    def __init__(self) -> None:
        self._stages = ImageMetrics()
        self._size = Histogram("scalp_batch_size", "images in a pass", _SIZES)
        self._photographs = Counter("scalp_batch_photographs", "images in all passes")
        self._room = Counter("scalp_batch_room", "images that the passes had room for")
        self._waiting = Gauge("scalp_waiting_photographs", "images that wait for the model")
        self._graded = Counter("scalp_graded", "images by grade and referral", ("grade", "refer"))
        self._reasons = Counter("scalp_refer_reasons", "reasons of referrals", ("reason",))
        self._unlikeness = Histogram("scalp_unlikeness", "from training; above 1 flagged", _UNLIKENESS)
        self._drift_level = Gauge("scalp_drift_level", "-1 too few, 0 none, 1 some, 2 strong")
        self._drift_photographs = Gauge("scalp_drift_photographs", "images in the window of drift")
        self._psi = Gauge("scalp_drift_psi", "stability index of what was compared", ("statistic",))
        self._info = Gauge("scalp_model_info", "1", ("model_version", "device", "precision"))
        self._predictor: Predictor | None = None
        self._window: DriftWindow | None = None

    def set_model(self, predictor: Predictor) -> None:
        """Set the current model; another predictor resets the window of drift."""
        if predictor is not self._predictor:
            self._predictor, self._window = predictor, DriftWindow(predictor.spec)

    def observe_batch(self, waits: Sequence[float], room: int, forward_seconds: float) -> None:
        """Record one forward pass.

        Args:
            waits: Seconds that each of its images waited.
            room: Maximum batch size.
            forward_seconds: Duration of the pass.
        """
        for wait in waits:
            self._stages.observe_stage("queue", wait)
        self._stages.observe_stage("forward", forward_seconds)
        self._size.observe(len(waits))
        self._photographs.inc(len(waits))
        self._room.inc(room)

    def observe_gradings(self, gradings: list[Grading], statistics: Sequence[np.ndarray]) -> None:
        """Record the gradings of one pass.

        Args:
            gradings: Gradings of its images.
            statistics: float (K,) per image, from `statistics.measure`.
        """
        for grading in gradings:
            self._graded.inc(1, {"grade": grading.grade_name, "refer": str(grading.refer).lower()})
            for reason in grading.refer_reasons:
                self._reasons.inc(1, {"reason": reason})
            if grading.unlikeness is not None:
                self._unlikeness.observe(grading.unlikeness)
        if self._window:
            self._window.add(gradings, np.stack(statistics))

    def publish(self, waiting: int) -> None:
        """Set the gauges; call it every few seconds, because Ray drops stale gauges.

        Args:
            waiting: Images in the queue of the model.
        """
        self._waiting.set(waiting)
        if self._predictor is None or self._window is None:
            return
        model = self._predictor
        self._info.set(
            1, {"model_version": model.model_version, "device": model.device, "precision": model.precision}
        )
        drift = self._window.drift()
        self._drift_level.set(_LEVELS[drift.level])
        self._drift_photographs.set(drift.photographs)
        for statistic in drift.statistics or ():
            if statistic.level != "too_few":
                self._psi.set(statistic.psi, {"statistic": statistic.name})
        if drift.grades.level != "too_few":
            self._psi.set(drift.grades.psi, {"statistic": "grade_mix"})


class MetricsMiddleware:
    """Outermost ASGI middleware: record each request with its outcome."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = RequestMetrics()
        self._stages = ImageMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        broken_off = True

        async def metered_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._stages.observe_stage("read", time.perf_counter() - started)
            return message

        try:
            await self._app(scope, metered_receive, send)
            broken_off = False
        finally:
            request = request_context.current()
            outcome = "broken_off" if broken_off else request.problem or "ok"
            seconds = time.perf_counter() - started
            self._requests.observe(request.route or "other", request.status, outcome, seconds)
