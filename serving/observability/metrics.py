"""What the endpoint counts, in Prometheus form: Ray's agent of each node exports it, named `ray_scalp_…`.

Counting takes a microsecond; processes hand their counts to the agent every ten seconds. Of a histogram the
agent keeps the buckets and makes its `_sum` up from their middles, so means are asked of the counters.
docs/serving.md lists all of them, cluster/dashboards shows them.
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

# Doubled about twice a decade: a quantile between two of them is told to a third.
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75]
_SECONDS += [1, 1.5, 2, 3, 5, 10, 30, 60]
_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_UNLIKENESS = [0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5]
_LEVELS: dict[Level, int] = {"too_few": -1, "none": 0, "some": 1, "strong": 2}


class ImageMetrics:
    """The way of images through a replica."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "scalp_stage_seconds", "an image's time in a stage", boundaries=_SECONDS, tag_keys=("stage",)
        )
        self._unreadable = Counter("scalp_unreadable", "images that no one can read", ("code",))

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """Counts one image, or for `forward` one pass."""
        self._seconds.observe(seconds, {"stage": stage})

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Counts what is done inside, unless it fails."""
        started = time.perf_counter()
        yield
        self.observe_stage(stage, time.perf_counter() - started)

    def observe_unreadable(self, code: str) -> None:
        """Counts an image that was refused.

        Args:
            code: of its `ImageError`.
        """
        self._unreadable.inc(1, {"code": code})


class RequestMetrics:
    """Requests of one ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "scalp_requests", "requests by their end: ok or a problem's code", ("path", "status", "outcome")
        )
        self._seconds = Histogram(
            "scalp_request_seconds", "from its first byte to the answer's last", _SECONDS, ("path",)
        )

    def observe(self, path: str, status: int, outcome: str, seconds: float) -> None:
        """Counts one request.

        Args:
            path: as the route is declared, never as it was sent.
            status: of the answer.
            outcome: `ok`, or the code of the problem.
            seconds: it took.
        """
        self._requests.inc(1, {"path": path, "status": str(status), "outcome": outcome})
        self._seconds.observe(seconds, {"path": path})


class GraderMetrics:
    """Passes, grades and drift of one grader replica."""

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
        """Says what answers from now on; with another predictor drift begins anew."""
        if predictor is not self._predictor:
            self._predictor, self._window = predictor, DriftWindow(predictor.spec)

    def observe_batch(self, waits: Sequence[float], room: int, forward_seconds: float) -> None:
        """Counts one pass.

        Args:
            waits: seconds that each of its images waited for it.
            room: images that it could have held.
            forward_seconds: it took.
        """
        for wait in waits:
            self._stages.observe_stage("queue", wait)
        self._stages.observe_stage("forward", forward_seconds)
        self._size.observe(len(waits))
        self._photographs.inc(len(waits))
        self._room.inc(room)

    def observe_gradings(self, gradings: list[Grading], statistics: Sequence[np.ndarray]) -> None:
        """Counts the answers of one pass.

        Args:
            gradings: of its images.
            statistics: float (K,) of each from `statistics.measure`.
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
        """Sets what is a state and not a count. To be called every few seconds: Ray forgets states.

        Args:
            waiting: images that wait for the model.
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
        for each in drift.statistics or ():
            if each.level != "too_few":
                self._psi.set(each.psi, {"statistic": each.name})
        if drift.grades.level != "too_few":
            self._psi.set(drift.grades.psi, {"statistic": "grade_mix"})


class MetricsMiddleware:
    """ASGI middleware around all others: counts each request by how it ended."""

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
