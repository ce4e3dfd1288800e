"""Spans of the stages of an image, with an exporter in memory, and the settings of the export."""

from __future__ import annotations

import asyncio
import os

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from scalp_core.errors import UserError
from serving import app
from serving.observability import tracing
from serving.observability.metrics import ImageMetrics
from serving.observability.tracing import TracingSettings
from serving.replicas.grader import Grader
from serving.replicas.handles import decode_image
from serving.settings import Settings
from tests.support.images import jpeg

COLLECTOR = "http://127.0.0.1:4318"


@pytest.fixture
def spans(monkeypatch):
    """Exporter in memory of a tracer that records all requests."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("scalp"))
    return exporter


async def grade(bundle) -> None:
    grader = Grader(Settings(device="cpu", precision="fp32"))
    await grader.reconfigure({"bundle": str(bundle), "max_batch_size": 4})
    preprocess = await grader.preprocess()
    with ImageMetrics().stage("decode"):
        image = decode_image(jpeg(0), preprocess)
    await grader.grade(image.decoded.pixels, image.statistics, preprocess)


def test_a_traced_request_has_a_span_per_stage_in_order(bundle, spans):
    async def scenario() -> None:
        with tracing._tracer.start_as_current_span("request") as request:
            assert tracing.traceparent().split("-")[1:3] == [
                f"{request.context.trace_id:032x}", f"{request.context.span_id:016x}",
            ]  # fmt: skip
            await grade(bundle)

    asyncio.run(scenario())
    stages = {span.name: span for span in spans.get_finished_spans()}
    request = stages.pop("request")
    assert list(stages) == ["decode", "queue", "forward"]
    assert {span.parent.span_id for span in stages.values()} == {request.context.span_id}
    decode, queue, forward = stages.values()
    assert decode.end_time <= queue.start_time + 10**6 and queue.end_time == pytest.approx(
        forward.start_time, abs=10**6
    )
    assert forward.start_time < forward.end_time <= request.end_time + 10**6
    assert forward.attributes == {"scalp.batch_size": 1}


def test_a_request_that_is_not_traced_has_no_spans(bundle, spans):
    asyncio.run(grade(bundle))
    never = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0))).get_tracer("scalp")

    async def unsampled() -> None:
        with never.start_as_current_span("request"):
            await grade(bundle)
            assert tracing.traceparent() is None

    asyncio.run(unsampled())
    assert spans.get_finished_spans() == () and tracing.traceparent() is None


def test_it_is_off_unless_a_collector_is_set(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    tracing.configure(TracingSettings())
    assert os.environ == {}
    tracing.configure(TracingSettings(collector=COLLECTOR, sampled=0.5))
    assert os.environ == {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serving.observability.tracing:span_processors",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.5",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"{COLLECTOR}/",
        "OTEL_SERVICE_NAME": "scalp",
    }


def test_a_collector_that_nothing_can_send_to_is_refused(monkeypatch):
    with pytest.raises(UserError, match="tracing is set in args"):
        app.build({"tracing": {"collector": COLLECTOR}})

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tracing, "import_module", missing)
    with pytest.raises(UserError, match="with the extra otlp"):
        tracing.configure(TracingSettings(collector=COLLECTOR))
    assert tracing._ENDPOINT_VARIABLE not in os.environ
    with pytest.raises(ValueError, match="collector"):
        TracingSettings(collector="127.0.0.1:4318")
