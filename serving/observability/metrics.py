"""Prometheus metrics of the endpoint, exported by Ray as `ray_scalp_…`, and drift of its last images.

An observation takes a microsecond; processes send their metrics to the agent every ten seconds. The agent
keeps the buckets of a histogram and estimates its `_sum` from their centers, so dashboards compute means from
counters. docs/metrics.md lists the metrics, cluster/dashboards shows them.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
from ray.serve.metrics import Counter, Gauge, Histogram

from scalp_core.bundles.contract import BundleSpec
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import Grading
from scalp_core.inference.predictor import Predictor
from scalp_core.results.drift import Drift, Level, count_statistics, measure_drift
from serving.observability.tracing import record_stage

Stage = Literal["read", "decode", "queue", "forward", "heatmap"]

# Bucket bounds in seconds, closest between 10 ms and 1 s.
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75]
_SECONDS += [1, 1.5, 2, 3, 5, 10, 30, 60]
_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_UNLIKENESS = [0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5]
_WINDOW_IMAGES = 2000  # several times `drift.MIN_PHOTOGRAPHS`, compared in 1.3 ms of one core
_LEVELS: dict[Level, int] = {"too_few": -1, "none": 0, "some": 1, "strong": 2}


class ImageMetrics:
    """Durations of the stages of an image in a replica, and unreadable images."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "scalp_stage_seconds",
            "seconds of an image in a stage. read: receive the body; decode: file to pixels and statistics; "
            "queue: wait for the model; forward: one pass; heatmap: Grad-CAM and the wait for it",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._unreadable = Counter(
            "scalp_unreadable", "images that were refused, those of batches included", ("code",)
        )
        self._kept = Counter(
            "scalp_kept",
            "images whose requests opted in to the store. result: kept, or the reason why not",
            ("result",),
        )

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """Record the duration of a stage of one image, or for `forward` of one pass."""
        self._seconds.observe(seconds, {"stage": stage})

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Record the duration of the block, unless it fails, and its span."""
        started = time.perf_counter()
        with record_stage(stage):
            yield
        self.observe_stage(stage, time.perf_counter() - started)

    def observe_unreadable(self, code: str) -> None:
        """Count an image that was refused."""
        self._unreadable.inc(1, {"code": code})

    def observe_kept(self, result: str) -> None:
        """Count an image whose request opted in to the store."""
        self._kept.inc(1, {"result": result})


class RequestMetrics:
    """Metrics of the requests of one ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter(
            "scalp_requests",
            "requests. path: template of the route, or other; outcome: ok, a problem's code, client_gone "
            "(the client disconnected during its request) or broken_off (the answer ended early)",
            ("path", "status", "outcome"),
        )
        self._seconds = Histogram(
            "scalp_request_seconds",
            "seconds from the first byte of the request to the last byte of the answer",
            _SECONDS,
            ("path",),
        )

    def observe(self, path: str, status: int, outcome: str, seconds: float) -> None:
        """Record one request by the path template of its route, and its outcome: `ok` or a problem's code."""
        self._requests.inc(1, {"path": path, "status": str(status), "outcome": outcome})
        self._seconds.observe(seconds, {"path": path})


class DriftWindow:
    """Window of the last images that one replica graded, compared with the training split of its bundle.

    Its size is a number of images, not of hours, because the comparison needs some hundred images.
    """

    def __init__(self, spec: BundleSpec, images: int = _WINDOW_IMAGES) -> None:
        self._spec = spec
        self._statistics = np.empty((images, len(STATISTICS)), np.float32)
        self._grades = np.empty(images, np.int8)
        self._seen = 0

    def add(self, gradings: list[Grading], statistics: np.ndarray) -> None:
        """Add images in order; the oldest are dropped.

        Args:
            statistics: float (N, K) from `statistics.measure`.
        """
        places = (self._seen + np.arange(len(gradings))) % len(self._grades)
        self._statistics[places] = statistics
        self._grades[places] = [grading.grade for grading in gradings]
        self._seen += len(gradings)

    def drift(self) -> Drift:
        """Measure the drift of the window."""
        size = min(self._seen, len(self._grades))
        counts = count_statistics(self._statistics[:size], self._spec.gates) if self._spec.gates else None
        names = Counts(self._spec.grade_names[grade] for grade in self._grades[:size].tolist())
        return measure_drift(counts, names, self._spec)


class GraderMetrics:
    """Metrics of the passes, grades and drift of one grader replica."""

    def __init__(self) -> None:
        self._stages = ImageMetrics()
        self._size = Histogram("scalp_batch_size", "images in a forward pass", _SIZES)
        self._photographs = Counter("scalp_batch_photographs", "images in all forward passes")
        self._room = Counter("scalp_batch_room", "images that these passes had space for")
        self._waiting = Gauge("scalp_waiting_photographs", "images that wait for the model in a replica")
        self._graded = Counter("scalp_graded", "images by likeliest grade and referral", ("grade", "refer"))
        self._reasons = Counter(
            "scalp_refer_reasons", "reasons of referrals; an image may have several", ("reason",)
        )
        self._unlikeness = Histogram(
            "scalp_unlikeness", "distance from the train split; above 1 an image is referred", _UNLIKENESS
        )
        self._lookups = Counter(
            "scalp_cache_lookups",
            "images that were looked up in the cache of answers; result: hit or miss. Hits count as graded",
            ("result",),
        )
        self._drift_level = Gauge(
            "scalp_drift_level",
            f"drift of the last {_WINDOW_IMAGES:,} images of a replica: -1 too few images, 0 none, 1 some, "
            "2 strong",
        )
        self._drift_photographs = Gauge("scalp_drift_photographs", "images that the drift is measured on")
        self._psi = Gauge(
            "scalp_drift_psi",
            "population stability index of each image statistic, and of grade_mix; absent while images are "
            "too few",
            ("statistic",),
        )
        self._info = Gauge(
            "scalp_model_info", "1 for each model that answers", ("model_version", "device", "precision")
        )
        self._predictor: Predictor | None = None
        self._window: DriftWindow | None = None

    def set_model(self, predictor: Predictor) -> None:
        """Set the current model; another predictor resets the window of drift."""
        if predictor is not self._predictor:
            self._predictor, self._window = predictor, DriftWindow(predictor.spec)

    def observe_batch(self, waits: Sequence[float], room: int, forward_seconds: float) -> None:
        """Record one forward pass."""
        for wait in waits:
            self._stages.observe_stage("queue", wait)
        self._stages.observe_stage("forward", forward_seconds)
        self._size.observe(len(waits))
        self._photographs.inc(len(waits))
        self._room.inc(room)

    def observe_gradings(self, gradings: list[Grading], statistics: Sequence[np.ndarray]) -> None:
        """Record the gradings of one pass.

        Args:
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

    def observe_lookup(self, is_hit: bool) -> None:
        """Record a lookup in the cache of answers."""
        self._lookups.inc(1, {"result": "hit" if is_hit else "miss"})

    def publish(self, waiting: int) -> None:
        """Set the gauges; call it every few seconds, because Ray drops stale gauges."""
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
