"""The endpoint as a client meets it: real Ray, real HTTP over loopback."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from jobs.common.images import LoadImages
from scalp_core.bundles.contract import GRAPH_FILES
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.images.codecs import FIRST_FRAME_ONLY, MAX_BYTES
from scalp_core.images.preprocess import decode
from scalp_core.inference.decision import Grading
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.overlay import heat_colors
from scalp_core.inference.predictor import Predictor
from scalp_core.results.schema import SCHEMA
from serving import app
from serving.api.middleware import RequestMiddleware
from serving.schemas.grading import GradeResponse
from tests.support import sockets
from tests.support.command import run_scalp
from tests.support.dicom_files import dicom
from tests.support.images import jpeg
from tests.support.odd_files import corpus
from tests.support.ports import free_port, free_ports
from tests.support.served import PRECISION


@pytest.fixture(scope="module")
def client(endpoint):
    with httpx.Client(base_url=endpoint.origin, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def predictor(bundle):
    return Predictor(load_bundle(str(bundle)), "cpu", PRECISION)


def expected(predictor: Predictor, data: bytes) -> Grading:
    return predictor.grade(decode(data, predictor.spec.preprocess).pixels[None])[0]


def post(client: httpx.Client, data: bytes, name: str = "a.jpg") -> httpx.Response:
    return client.post("/v1/grade", files={"file": (name, data, "image/jpeg")})


def post_until_heard(client: httpx.Client, data: bytes) -> httpx.Response:
    """Post a file that may be refused before it is sent: its answer may be lost with the connection."""
    while True:
        with suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            return post(client, data)


def check_answer(answer: dict, data: bytes, predictor: Predictor) -> None:
    truth = expected(predictor, data)
    assert answer["sha256"] == hashlib.sha256(data).hexdigest()
    np.testing.assert_allclose(answer["probabilities"], truth.probabilities, atol=1e-5)
    for name in ("grade", "grade_name", "grade_set", "refer", "refer_reasons"):
        assert answer[name] == getattr(truth, name), name


def check_problem(response: httpx.Response, status: int, code: str) -> dict:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (response.status_code, body["status"], body["code"]) == (status, status, code)
    assert set(body) == {"type", "title", "status", "detail", "code", "request_id"}
    assert body["detail"] and "\n" not in body["detail"] and "Traceback" not in response.text
    return body


def test_one_replica_of_each_part_is_one_process(endpoint):
    assert [name for name, _ in endpoint.replicas()] == ["ray::ServeReplica:scalp:Grader"]


def test_grades_a_photograph_as_the_predictor_does(client, predictor):
    data = jpeg(0)
    response = post(client, data, "private name.jpg")
    answer = response.json()
    check_answer(answer, data, predictor)
    assert response.status_code == 200
    assert "private name" not in response.text
    assert set(answer) == set(GradeResponse.model_fields)
    assert answer["status"] == "graded" and answer["image_id"] == answer["sha256"][:20]
    assert all(answer[name] is None for name in ("uri", "member", "error_code", "error"))
    assert sum(answer["probabilities"]) == pytest.approx(1)
    assert answer["expected_severity"] == pytest.approx(np.dot(answer["probabilities"], range(4)))
    assert answer["model_version"] == predictor.spec.model_version
    age = datetime.now(UTC) - datetime.fromisoformat(answer["graded_at"])
    assert timedelta(0) <= age < timedelta(minutes=1)


@pytest.mark.promise("README: the endpoint answers the fields of a row")
def test_answer_has_the_fields_of_a_bulk_row(client):
    assert list(post(client, jpeg(0)).json()) == SCHEMA.names


@pytest.mark.parametrize("grade", [None, 1])
def test_a_heatmap_is_that_of_the_explainer(client, bundle, predictor, grade):
    data = jpeg(5)
    fields = {"heatmap": "true"} | ({} if grade is None else {"heatmap_grade": str(grade)})
    answer = client.post("/v1/grade", files={"file": data}, data=fields).json()
    check_answer(answer, data, predictor)
    heatmap = answer["heatmap"]
    assert heatmap["grade"] == (answer["grade"] if grade is None else grade)
    assert "not where the lesion is" in heatmap["meaning"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(heatmap["png"]))))
    image = decode(data, predictor.spec.preprocess).pixels
    truth = make_explainer(load_bundle(str(bundle)), "cpu").heatmap(image, heatmap["grade"])
    assert truth.max() == 1
    np.testing.assert_allclose(pixels[..., 3] / 255, truth, atol=0.01)
    assert (pixels[..., :3] == heat_colors()[pixels[..., 3]]).all()


def post_until_admitted(client: httpx.Client, data: bytes) -> httpx.Response:
    """As a client does that obeys `Retry-After`: a slow machine refuses some of many at once."""
    while (response := post(client, data)).status_code == 503:
        time.sleep(float(response.headers["retry-after"]))
    return response


def test_parallel_requests_get_their_own_answers(client, predictor):
    photographs = [jpeg(seed) for seed in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda data: post_until_admitted(client, data).json(), photographs))
    for answer, data in zip(answers, photographs, strict=True):
        check_answer(answer, data, predictor)
    # Each is far from every other one, so the checks above would have seen a mixed-up row.
    table = np.array([answer["probabilities"] for answer in answers])
    distances = np.abs(table[:, None] - table[None]).max(axis=-1)
    assert distances[~np.eye(24, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "empty"),
        (b"this is a text, whatever its name says\n", 415, "not_an_image"),
        (jpeg(0)[:-3000], 422, "truncated"),
        (bytes(MAX_BYTES + 1), 413, "too_many_bytes"),  # passes with the form, fails as a photograph
        (bytes(MAX_BYTES + 2**20), 413, "too_many_bytes"),  # the form alone is too large
    ],
    ids=["empty", "text", "truncated", "oversized", "oversized-form"],
)
def test_refuses_what_is_no_photograph(client, data, status, code):
    check_problem(post_until_heard(client, data), status, code)


def test_a_dicom_file_has_the_answer_of_its_jpeg(client):
    image = jpeg(3)
    alone, wrapped = (post(client, data).json() for data in (image, dicom(image, (640, 480))))
    names = ("grade", "probabilities", "grade_set", "refer_reasons", "unlikeness")
    assert [wrapped[name] for name in names] == [alone[name] for name in names]


def test_every_file_gets_the_code_of_its_result_row(client, predictor, tmp_path):
    names = sorted(corpus())
    for name in names:
        (tmp_path / name).write_bytes(corpus()[name][0])
    uris = np.array([str(tmp_path / name) for name in names])
    rows = LoadImages(predictor.spec.preprocess)({"uri": uris, "member": np.full(len(names), "")})
    too_large = set()  # for the endpoint alone: `limits.max_megapixels`
    for name, code in zip(names, rows["error_code"], strict=True):
        answer = post_until_heard(client, (tmp_path / name).read_bytes())
        if answer.json().get("code") == "too_many_pixels" != code:
            too_large.add(name)
            continue
        assert answer.json().get("code", "") == code, name
        assert (answer.status_code == 200) == (code == ""), name
    assert too_large == {"PNG_7000x7000", "WEBP_7000x7000", "bomb_jpeg_scans"}
    assert len(set(rows["error_code"])) > 8


def test_of_an_animated_picture_the_first_is_graded_and_said(client):
    data, _ = corpus()["webp_animated"]
    assert post(client, data).json()["notes"] == [FIRST_FRAME_ONLY]


def test_refuses_an_endless_body_of_undeclared_length(client):
    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(2**20)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    check_problem(client.post("/v1/grade", content=chunks(), headers=headers), 413, "too_many_bytes")


def test_refuses_wrong_requests(client):
    check_problem(client.post("/v1/grade"), 415, "unsupported_body")
    check_problem(client.post("/v1/grade", data={"file": "text"}), 415, "unsupported_body")
    check_problem(client.post("/v1/grade", files={"image": jpeg(0)}), 422, "no_file")
    check_problem(client.post("/v1/grade", headers={"Content-Type": "multipart/form-data"}), 400, "bad_form")
    wrong = client.post("/v1/grade", files={"file": jpeg(0)}, data={"heatmap": "true", "heatmap_grade": "4"})
    assert "heatmap_grade" in check_problem(wrong, 422, "bad_field")["detail"]
    check_problem(client.get("/v1/nothing"), 404, "not_found")
    check_problem(client.get("/docs"), 404, "not_found")  # would load scripts from another host
    response = client.get("/v1/grade")
    check_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_answers_carry_the_request_id(client):
    assert len(client.get("/healthz").headers["x-request-id"]) >= 32
    refused = client.get("/v1/nothing", headers={"X-Request-ID": "visit-7"})
    assert refused.headers.get_list("x-request-id") == ["visit-7"]
    assert refused.json()["request_id"] == "visit-7"


def test_probes_and_model(client, predictor):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    model = client.get("/v1/model").json()
    assert model["model_version"] == predictor.spec.model_version
    assert [grade["name"] for grade in model["grades"]] == list(GRADE_NAMES)
    assert [grade["name_ko"] for grade in model["grades"]] == list(GRADE_NAMES_KO)
    assert (model["device"], model["precision"]) == ("cpu", PRECISION)
    assert model["preprocess"] == predictor.spec.preprocess.model_dump(mode="json")
    assert "Not a diagnosis" in model["intended_use"]


def test_page_is_closed_to_other_hosts(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/page.css").headers["content-type"].startswith("text/css")
    assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")


def test_a_failure_of_the_server_shows_no_traceback():
    api = FastAPI()
    api.add_middleware(RequestMiddleware)

    @api.get("/fails")
    async def fails() -> None:
        raise RuntimeError("secret detail")

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            return await client.get("/fails")

    response = asyncio.run(get())
    check_problem(response, 500, "internal")
    assert "secret" not in response.text


@pytest.mark.promise("README: beyond loopback only with keys")
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com"])  # noqa: S104
def test_refuses_to_listen_on_the_network(bundle, host):
    with pytest.raises(UserError, match="open to the network") as refusal:
        app.start(str(bundle), host, free_port())
    assert "\n" not in str(refusal.value)


def test_refuses_a_port_of_grpc_that_it_cannot_offer(bundle, monkeypatch):
    port, grpc_port = free_ports(2)
    with pytest.raises(UserError, match=f"--port and --grpc-port are both {port}"):
        app.start(str(bundle), "127.0.0.1", port, grpc_port=port)
    taken = pytest.raises(UserError, match="is in use; choose another one with --grpc-port")
    with socket.create_server(("127.0.0.1", grpc_port)), taken:
        app.start(str(bundle), "127.0.0.1", port, grpc_port=grpc_port)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="--grpc-port needs the HAProxy of a local Ray"):
        app.start(str(bundle), "127.0.0.1", port, grpc_port=grpc_port)


def test_refuses_a_damaged_bundle(bundle, tmp_path):
    for file in Path(bundle).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _, name = GRAPH_FILES["float"]
    weights = bytearray((tmp_path / name).read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / name).write_bytes(weights)
    with pytest.raises(UserError, match="does not match its sha256"):
        app.start(str(tmp_path), "127.0.0.1", free_port())


def test_command_says_that_the_port_is_taken(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_scalp("serve", bundle, "--port", port)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: port {port} of 127.0.0.1 is in use",
        "hint:  choose another one with --port",
    ]


@pytest.mark.slow
def test_commands_serve_beside_each_other_until_they_are_interrupted(bundle):
    with ExitStack() as stack:
        servers = []
        for port in free_ports(2):
            command = [sys.executable, "-m", "jobs.cli", "serve", str(bundle), "--port", str(port)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            server = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(server.terminate)
            servers.append((port, server))
        for port, server in servers:
            assert server.stdout.readline().startswith(f"READY http://127.0.0.1:{port}")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                assert post(client, jpeg(0)).status_code == 200
        one, other = ({each.port for each in sockets.listening(server.pid)} for _, server in servers)
        assert len(one) > 5 and len(other) > 5
        assert not one & other  # or one of them would be asked what the other was meant to answer
        for _, server in servers:
            server.terminate()  # which serve takes as Ctrl-C
        for _, server in servers:
            rest, errors = server.communicate(timeout=60)
            assert (server.returncode, rest, errors) == (0, "stopping\n", "")
