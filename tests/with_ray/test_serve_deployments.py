"""A real endpoint of several deployments: its traces, explainer from zero, a store and its review."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from scalp_core import storage
from scalp_core.labels.log import read_labels
from serving.auth.keys import KeySettings
from serving.schemas.review import ReviewSettings
from serving.schemas.store import StoreSettings
from serving.settings import Scaling, Settings
from tests.support import sockets
from tests.support.command import run_scalp
from tests.support.images import jpeg
from tests.support.reviewing import REVIEW
from tests.support.served import PRECISION, Served, scalp_serve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FALLBACK_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
STAGES = {"decode", "queue", "forward"}
NAME = "visit-of-a-person.jpg"
WAIT_S = 60
KEY = "key-of-a-clinic-that-is-long-enough"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def collecting() -> Iterator[SimpleNamespace]:
    """A collector of OTLP over HTTP on loopback: its URL, and the spans and bytes that it received."""
    received = SimpleNamespace(spans=[], bytes=b"")

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.bytes += body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    received.spans += scope.spans
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    received.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[SimpleNamespace]:
    with collecting() as receiving:
        yield receiving


@pytest.fixture(scope="module")
def review(tmp_path_factory) -> ReviewSettings:
    """A review of the store of the endpoint."""
    folder = tmp_path_factory.mktemp("review")
    return ReviewSettings(graded=str(folder / "kept"), labels=str(folder / "labels"))


@pytest.fixture(scope="module")
def served(bundle, collector, review, tmp_path_factory) -> Iterator[Served]:
    # More than one replica is possible: ingress, grader, explainer and reviewer are separate processes.
    explainer = Scaling(
        min_replicas=0,
        max_replicas=2,
        target_ongoing_requests=2,
        max_ongoing_requests=4,
        max_queued_requests=16,
    )
    tracing = {"collector": collector.url, "sampled": 0}
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"clinic: {KEY} scope=grade scope=keep scope=review")
    keys.chmod(0o600)
    settings = Settings(
        device="cpu",
        precision=PRECISION,
        explainer=explainer,
        tracing=tracing,
        keys=KeySettings(file=str(keys)),
        review=review,
        store=StoreSettings(folder=review.graded),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with scalp_serve(bundle, settings, tmp_path_factory.mktemp("served"), killed=True) as endpoint:
            yield endpoint


def post(origin: str, *, heatmap: bool = False, **headers: str) -> httpx.Response:
    files = {"file": (NAME, jpeg(0), "image/jpeg")}
    url = f"{origin}/v1/grade?heatmap={heatmap}&patient=kim"
    return httpx.post(url, files=files, headers=HEADERS | headers, timeout=60).raise_for_status()


def fallback_origin(pid: int) -> str:
    """Address of the proxy of Ray Serve that HAProxy leads to until it has found the replicas."""
    origins = [
        f"http://127.0.0.1:{each.port}"
        for each in sockets.listening(pid)
        if each.process == "ray::ProxyActor"
    ]
    (origin,) = [origin for origin in origins if speaks_http(origin)]
    return origin


def speaks_http(origin: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{origin}/-/healthz").status_code == 200
    return False


def await_spans(spans: list[Span]) -> dict[str, dict[str, list[Span]]]:
    """Wait until both traces have each stage and the client's child; return the spans by trace and name."""
    deadline = time.monotonic() + WAIT_S
    while True:
        traces: dict[str, dict[str, list[Span]]] = {TRACE: {}, FALLBACK_TRACE: {}}
        for span in list(spans):
            traces.setdefault(span.trace_id.hex(), {}).setdefault(span.name, []).append(span)
        is_whole = all(trace.keys() >= STAGES and children(trace) for trace in traces.values())
        if is_whole and are_connected(traces):
            return traces
        assert time.monotonic() < deadline, {key: list(trace) for key, trace in traces.items()}
        time.sleep(0.1)


def are_connected(traces: dict[str, dict[str, list[Span]]]) -> bool:
    """Whether the parent of each span has come too: each process exports its spans at its own time."""
    spans = [span for trace in traces.values() for named in trace.values() for span in named]
    known = {span.span_id for span in spans} | {bytes.fromhex(PARENT)}
    return all(span.parent_span_id in known for span in spans)


def children(trace: dict[str, list[Span]]) -> list[Span]:
    return [span for spans in trace.values() for span in spans if span.parent_span_id.hex() == PARENT]


def test_a_trace_leads_from_the_client_through_queue_and_forward_pass(served, collector):
    assert "traceparent" not in post(served.origin).headers
    answer = post(served.origin, traceparent=f"00-{TRACE}-{PARENT}-01")
    post(fallback_origin(served.pid), traceparent=f"00-{FALLBACK_TRACE}-{PARENT}-01")
    traces = await_spans(collector.spans)
    assert traces.keys() == {TRACE, FALLBACK_TRACE}  # the first request is not traced
    assert answer.headers["traceparent"].split("-")[1] == TRACE
    by_id = {span.span_id: span for span in collector.spans}

    def ancestors(span: Span) -> list[str]:
        parent = by_id.get(span.parent_span_id)
        return [parent.name, *ancestors(parent)] if parent else []

    for trace in traces.values():
        (request,) = children(trace)
        for stage in STAGES:
            (span,) = trace[stage]
            assert ancestors(span)[-1] == request.name
        assert any("Grader" in name for name in ancestors(trace["forward"][0]))
    for secret in (NAME.encode(), b"kim", KEY.encode(), answer.json()["grade_name"].encode()):
        assert secret not in collector.bytes


def test_the_first_heatmap_starts_the_explainer(served):
    assert explainers(served) == 0
    answer = post(served.origin, heatmap=True).json()
    assert base64.b64decode(answer["heatmap"]["png"]).startswith(b"\x89PNG")
    assert explainers(served) == 1


def test_a_separate_process_reviews_the_kept_images_and_a_removed_one_leaves(served, review):
    assert sum("Reviewer" in name for name, _ in served.replicas()) == 1
    with httpx.Client(base_url=served.origin, headers=HEADERS, timeout=60) as client:
        kept = []
        for seed in range(3):
            graded = client.post("/v1/grade", files={"file": jpeg(seed)}, data={"keep": "true"})
            kept.append(graded.raise_for_status().json()["kept"]["image_id"])
        state = client.get(REVIEW).raise_for_status().json()
        assert (state["images"], state["first"]) == (3, kept[0])
        picture = client.get(f"{REVIEW}/images/{kept[0]}/picture")
        assert picture.headers["content-type"] == "image/jpeg" and picture.content.startswith(b"\xff\xd8")
        saved = client.post(f"{REVIEW}/images/{kept[0]}/answer", json={"grade": 2}).raise_for_status().json()
        assert saved["first_open"] == kept[1]
        (label,) = read_labels(review.labels)
        assert (label.image_id, label.reader, label.grade) == (kept[0], "clinic", 2)
        storage.write(label.uri.replace(kept[0], kept[1]), jpeg(99))
        problems = [client.get(f"{REVIEW}/images/{image}/picture").json() for image in (kept[1], "none")]
        assert [problem["code"] for problem in problems] == ["changed", "unknown_image"]
        removed = run_scalp("store", "remove", review.graded, kept[2])
        assert removed.stdout == f"removed {kept[2]}\n", removed.stderr
        left = client.get(REVIEW).raise_for_status().json()
    assert (left["images"], left["left"]) == (2, 1)
    assert kept[2] not in "".join(storage.list_files(review.graded))


def explainers(served: Served) -> int:
    return sum("Explainer" in name for name, _ in served.replicas())
