"""Traces of requests by OpenTelemetry, sent to a collector by OTLP.

Ray Serve makes the spans of requests and of calls between replicas, and passes `traceparent` on. This module
exports them, and adds a span per stage of an image: decode, queue, forward, heatmap. Spans contain no image,
file name, address or grade.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import BaseModel, Field, HttpUrl

from scalp_core.errors import UserError

# Ray Serve's `tracing_config` is not given to its fallback proxy (Ray 2.60), which answers until HAProxy has
# found the replicas: those requests would lose their trace. These variables reach each process.
EXPORTER_VARIABLE = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"
SAMPLED_VARIABLE = "RAY_SERVE_TRACING_SAMPLING_RATIO"
_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_SERVICE_VARIABLE = "OTEL_SERVICE_NAME"

_tracer = trace.get_tracer("scalp")


class TracingSettings(BaseModel, extra="forbid", frozen=True):
    """Export of traces by an endpoint that starts a local Ray."""

    collector: HttpUrl | None = Field(
        None,
        description="base URL of a collector of OTLP over HTTP, such as `http://127.0.0.1:4318`; None: off",
    )
    sampled: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the requests without `traceparent` that are traced; with it, its flag decides",
    )


def span_processors() -> list[Any]:
    """Processors of the spans of one process; Ray Serve calls this in each.

    The collector, its headers and timeouts are in the environment variables of OpenTelemetry.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def configure(settings: TracingSettings) -> None:
    """Set the environment of a Ray that starts, if a collector is set.

    Raises:
        UserError: The exporter is not installed.
    """
    if settings.collector is None:
        return
    try:
        import_module("opentelemetry.exporter.otlp.proto.http")
    except ImportError:
        raise UserError(
            "tracing.collector is set, but opentelemetry-exporter-otlp-proto-http is not installed; install "
            "scalp with the extra otlp, or remove tracing from the settings"
        ) from None
    os.environ[_ENDPOINT_VARIABLE] = str(settings.collector)
    os.environ[EXPORTER_VARIABLE] = f"{__name__}:{span_processors.__name__}"
    os.environ[SAMPLED_VARIABLE] = str(settings.sampled)
    os.environ.setdefault(_SERVICE_VARIABLE, "scalp")


def current_span() -> Span | None:
    """The span of this task if it is recorded, otherwise None."""
    span = trace.get_current_span()
    return span if span.is_recording() else None


def traceparent() -> str | None:
    """`traceparent` of the current span if it is recorded."""
    carrier: dict[str, str] = {}
    if current_span():
        TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def record_stage(stage: str) -> Iterator[None]:
    """Record a span while the block runs, if the current span is recorded."""
    if current_span() is None:
        yield
        return
    with _tracer.start_as_current_span(stage, record_exception=False):
        yield


def record_past_stage(
    parent: Span | None, stage: str, started: float, ended: float, **attributes: int
) -> None:
    """Record a span of a stage that has ended, if its parent is recorded.

    Args:
        started: Start by `time.monotonic`.
        ended: End by `time.monotonic`.
    """
    if parent is None:
        return
    offset = time.time() - time.monotonic()
    span = _tracer.start_span(
        stage,
        trace.set_span_in_context(parent),
        attributes={f"scalp.{name}": value for name, value in attributes.items()},
        start_time=int((started + offset) * 1e9),
    )
    span.end(int((ended + offset) * 1e9))
