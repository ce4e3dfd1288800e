"""The metrics of a running endpoint, and whether dashboard and alerts ask for what it exports."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import yaml

from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.images import gates as image_gates
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import decode
from serving import app
from serving.settings import Scaling, Settings
from tests.support import sockets
from tests.support.images import jpeg
from tests.support.metrics import (
    Sample,
    alert_queries,
    dashboard_queries,
    metrics_uris,
    scrape,
    total,
    unanswered,
)
from tests.support.ports import free_port
from tests.support.served import PRECISION
from tests.with_ray.test_serve import post

CONFIG = Path(app.__file__).parent / "config.yaml"
NAME, KEY = "visit of a person.jpg", "a-key-that-nobody-may-read"
DRIFT_NEEDS = 320  # photographs
# Exported on nodes that have one.
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}


class Run(NamedTuple):
    """What was sent to an endpoint, and what came of it."""

    graded: int
    referred: int
    ended: Counter[tuple[str, str]]  # path and outcome
    samples: list[Sample]
    logs: str
    listening: set[sockets.Listening]
    without_token: dict[sockets.Listening, set[str]]
    poison: Path  # exists if a process loaded a pickle that came without a token


@pytest.fixture(scope="module")
def known(bundle, tmp_path_factory) -> Path:
    """A bundle that knows other photographs: darker ones."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("known"), dirs_exist_ok=True))
    loaded = load_bundle(str(folder))
    small = loaded.spec.preprocess
    dark = [decode(jpeg(seed, (96, 96)), small).pixels // 3 for seed in range(60)]
    statistics = image_statistics.measure_all(dark)
    gates = image_gates.fit_gates(statistics[:40], statistics[40:]).model_copy(update={"photographs": 50_000})
    training = loaded.spec.training.model_copy(update={"grade_counts": [9000, 9000, 9000, 9000]})
    save_bundle(str(folder), loaded.spec.model_copy(update={"gates": gates, "training": training}), {})
    return folder


@pytest.fixture(scope="module")
def run(known, cluster, tmp_path_factory) -> Run:
    """An endpoint with a short queue and much to do, logging as `config.yaml` says."""
    logs = tmp_path_factory.mktemp("logs")
    port = free_port()
    grader = Scaling(target_ongoing_requests=8, max_ongoing_requests=32, max_queued_requests=1)
    # With several ingresses, as on a cluster: Ray counts the calls between deployments.
    ingress = Settings().ingress.model_copy(update={"max_replicas": 2})
    settings = Settings(device="cpu", precision=PRECISION, ingress=ingress, grader=grader)
    logging = yaml.safe_load(CONFIG.read_text())["logging_config"] | {"logs_dir": str(logs)}
    before = {each.labels.get("replica") for each in scrape()} - {None}  # of other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_LOGGING", logging)
        app.start(str(known), "127.0.0.1", port, settings)
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
            answers = _send(client)
            client.get("/readyz")
            graded = sum(answer.status_code == 200 for answer in answers["/v1/grade"])
            ended = Counter(
                (path, answer.json().get("code", "ok")) for path, found in answers.items() for answer in found
            )
            samples = _settled(graded, ended, before)
            listening = sockets.listening()
            poison = tmp_path_factory.mktemp("poison") / "loaded"
            without_token = sockets.unauthenticated(listening, poison)
            listening &= sockets.listening()  # without those of processes that ended meanwhile
    finally:
        app.stop()
    return Run(
        graded,
        sum(answer.status_code == 200 and answer.json()["refer"] for answer in answers["/v1/grade"]),
        ended,
        samples,
        "".join(file.read_text() for file in sorted(logs.glob("replica_*.log"))),
        listening,
        without_token,
        poison,
    )


def _send(client: httpx.Client) -> dict[str, list[httpx.Response]]:
    """Send images until drift is measured, and as many at a time that the short queue refuses one."""
    graded: list[httpx.Response] = []

    def send(images: int, at_once: int) -> None:
        data = [jpeg(seed, (96, 96)) for seed in range(len(graded), len(graded) + images)]
        with ThreadPoolExecutor(at_once) as pool:
            graded.extend(pool.map(lambda image: _posted(client, image), data))

    while missing := DRIFT_NEEDS - sum(answer.status_code == 200 for answer in graded):
        send(missing, 6)
    while all(answer.status_code == 200 for answer in graded):
        send(64, 64)
    graded.append(post(client, b"no photograph", NAME))
    graded.append(client.post("/v1/grade", files={"file": jpeg(0)}, data={"heatmap": "true"}))
    return {
        "/v1/grade": graded,
        "/v1/model": [client.get("/v1/model")],
        "other": [client.get("/v1/nothing")],
    }


def _posted(client: httpx.Client, photograph: bytes) -> httpx.Response:
    """Sent again where the connection was lost: had the server counted it, the totals would not agree."""
    while True:
        with suppress(httpx.RemoteProtocolError):
            return post(client, photograph, NAME)


def _settled(graded: int, ended: Counter[tuple[str, str]], before: set[str]) -> list[Sample]:
    """Scrape until every process has exported its metrics, each at its own time; at the end, what there is.

    A scrape takes the gauges away until they are set again, so the last sample of each series counts.
    """
    queries = dashboard_queries("serving") + alert_queries("serving")
    series: dict[tuple[str, ...], Sample] = {}
    until = time.monotonic() + 90
    while True:
        for each in scrape():
            if each.labels.get("replica") not in before:
                series[each.name, *map(str, sorted(each.labels.items()))] = each
        samples = list(series.values())
        counts = [total(samples, "ray_scalp_requests_total", path=p, outcome=o) for p, o in ended]
        is_settled = (
            counts == list(ended.values())
            and total(samples, "ray_scalp_graded_total") == graded
            and total(samples, "ray_scalp_stage_seconds_count", stage="heatmap") == 1
            and not unanswered(queries, samples, OF_GPUS)
        )
        if is_settled or time.monotonic() > until:
            return samples
        time.sleep(0.5)


def test_counts_are_those_of_what_was_sent(run):
    samples = run.samples
    for (path, outcome), times in run.ended.items():
        assert total(samples, "ray_scalp_requests_total", path=path, outcome=outcome) == times, outcome
    assert run.ended["/v1/grade", "overloaded"] > 0  # the queue was short
    assert total(samples, "ray_scalp_request_seconds_count", path="/v1/grade") == sum(
        times for (path, _), times in run.ended.items() if path == "/v1/grade"
    )
    assert total(samples, "ray_scalp_unreadable_total", code="not_an_image") == 1
    assert total(samples, "ray_scalp_graded_total", refer="true") == run.referred > 0
    assert total(samples, "ray_scalp_unlikeness_count") == run.graded
    assert total(samples, "ray_scalp_stage_seconds_count", stage="queue") == run.graded
    assert total(samples, "ray_scalp_stage_seconds_count", stage="heatmap") == 1
    passes = total(samples, "ray_scalp_batch_size_count")
    assert passes == total(samples, "ray_scalp_stage_seconds_count", stage="forward")
    assert (
        0 < passes <= run.graded
    )  # tests/serving/replicas/test_serving_grader.py holds that images share a pass
    assert total(samples, "ray_scalp_batch_photographs_total") == run.graded
    assert total(samples, "ray_scalp_batch_room_total") == app._CPU_BATCH * passes


def test_drift_of_the_photographs_is_told(run):
    levels = [each.value for each in run.samples if each.name == "ray_scalp_drift_level"]
    assert levels == [2]
    psi = {each.labels["statistic"]: each.value for each in run.samples if each.name == "ray_scalp_drift_psi"}
    assert set(psi) == {*image_statistics.STATISTICS, "grade_mix"}
    assert psi["luma_mean"] > 0.25


def test_no_label_grows_with_what_clients_send(run):
    samples = [each for each in run.samples if each.name.startswith("ray_scalp_")]
    assert samples
    for sent in (NAME, "nothing", KEY):
        assert not any(sent in str(each.labels) for each in samples), sent


def test_beyond_loopback_listens_only_what_the_documentation_names(run):
    assert metrics_uris()[0].startswith("http://127.0.0.1:")
    assert sockets.exposed(run.listening) == sockets.documented("serve") != set()


def test_ray_refuses_calls_without_the_token_at_each_of_its_ports(run):
    answered = {each: codes for each, codes in run.without_token.items() if "OK" in codes}
    assert not answered
    refused = {each for each, codes in run.without_token.items() if "UNAUTHENTICATED" in codes}
    assert refused >= {each for each in run.listening if each.is_beyond_loopback}
    assert {each.process for each in refused} >= {"gcs_server", "raylet", "ray::ServeReplica"}
    assert not run.poison.exists()


def test_log_lines_are_json_and_tell_nothing_of_photographs_and_keys(run):
    lines = [json.loads(line) for line in run.logs.splitlines()]
    assert {line["deployment"] for line in lines} >= {"scalp_Ingress"}
    assert all(line["levelname"] and line["message"] for line in lines)
    for secret in (NAME, KEY, "JFIF", "Exif"):
        assert secret not in run.logs


def test_dashboard_and_alerts_ask_for_what_is_exported(run):
    questions = dashboard_queries("serving") + alert_queries("serving")
    assert not (missing := unanswered(questions, run.samples, OF_GPUS)), "\n".join(missing)
