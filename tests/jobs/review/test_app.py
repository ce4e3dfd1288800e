"""The server of a review: who may ask, what it sends of an image, and which answers it refuses."""

from __future__ import annotations

import io
import re
from importlib import resources

import pytest
from PIL import Image
from starlette.testclient import TestClient

from jobs.review.app import create_app
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.labels.log import REASONS, read_labels
from scalp_core.results.schema import RESULTS_FOLDER
from serving.http.headers import SECURITY_HEADERS
from tests.support import result_rows
from tests.support.images import jpeg
from tests.support.reviewing import ids, open_review, referred_row, write_run

TOKEN = "token-of-the-test"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


@pytest.fixture
def session(tmp_path, labels):
    return open_review(write_run(tmp_path, 4), labels)


def visit(session, token=TOKEN):
    client = TestClient(create_app(session, TOKEN, 8001), base_url="http://127.0.0.1:8001")
    client.get(f"/?token={token}")
    return client


@pytest.fixture
def client(session):
    return visit(session)


def test_the_address_with_the_token_opens_the_page(session):
    client = TestClient(create_app(session, TOKEN, 8001), base_url="http://127.0.0.1:8001")
    opened = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"].lower()
    assert cookie.startswith("scalp-review-8001=") and "httponly" in cookie and "samesite=lax" in cookie
    page = client.get("/")
    assert page.status_code == 200 and "<script>" not in page.text and "style=" not in page.text
    for name in ("page.css", "review.css", "review.js", "words.js", "korean.js"):
        assert client.get(f"/page/{name}").status_code == 200, name
    assert client.get("/page/review.html").status_code == 404
    assert client.get("/page/..%2fapp.py").status_code == 404


def test_the_page_has_each_text_in_both_languages():
    words = (
        resources.files("serving").joinpath("web", "review", "review_words.js").read_text(encoding="utf-8")
    )
    english, korean = (re.findall(r'^  "([\w.-]+)": "', part, re.M) for part in words.split("KOREAN, {"))
    assert english == korean and english
    assert {f"review.reason.{reason}" for reason in REASONS} <= set(english)


@pytest.mark.parametrize("token", ["", "wrong", "토큰"])
def test_nothing_is_sent_without_the_token(session, token):
    client = visit(session, token)
    image = ids(session)[0]
    for path in (
        "/",
        "/v1/review",
        f"/v1/review/images/{image}",
        f"/v1/review/images/{image}/picture",
        "/page/review.js",
    ):
        answer = client.get(path)
        assert answer.status_code == 403, path
        assert "scalp review" in answer.text
    assert client.post(f"/v1/review/images/{image}/answer", json={"grade": 1}).status_code == 403


def test_each_response_has_the_security_headers(client, session):
    for path in ("/", "/v1/review", f"/v1/review/images/{ids(session)[0]}/picture", "/v1/review/images/none"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_the_picture_of_files_and_members_is_sent_without_metadata(client, session):
    for image in ids(session):
        answer = client.get(f"/v1/review/images/{image}/picture")
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (320, 240)


def test_exif_does_not_leave_and_large_pictures_are_reduced(tmp_path, labels):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "name of a patient"
    data = jpeg(1, (4000, 2000), exif=exif)
    storage.write(f"{tmp_path}/a.jpg", data)
    result_rows.write(f"{tmp_path}/graded/{RESULTS_FOLDER}", [referred_row(f"{tmp_path}/a.jpg", data)], 1)
    session = open_review(f"{tmp_path}/graded", labels)
    sent = visit(session).get(f"/v1/review/images/{ids(session)[0]}/picture").content
    picture = Image.open(io.BytesIO(sent))
    assert picture.size == (1024, 2048)  # upright
    assert not picture.getexif() and b"patient" not in sent


def test_a_changed_or_missing_file_is_a_problem_with_a_code(client, session):
    first, second, *_ = ids(session)
    storage.write(session.location(first).uri, jpeg(99))
    storage.remove_file(session.location(second).uri)
    codes = [client.get(f"/v1/review/images/{image}/picture").json()["code"] for image in (first, second)]
    assert codes == ["changed", "not_found"]


def test_an_answer_is_durable_when_the_server_says_saved(client, session, labels):
    first, second, *_ = ids(session)
    assert client.get("/v1/review").json()["first_open"] == first
    saved = client.post(f"/v1/review/images/{first}/answer", json={"grade": 2, "comment": "물기"})
    assert saved.json() == {
        "answer": {"grade": 2, "reason": None, "comment": "물기"},
        "left": 3,
        "first_open": second,
    }
    assert [label.grade for label in read_labels(labels)] == [2]
    client.post(f"/v1/review/images/{first}/answer", json={"reason": "cannot_be_graded"})
    assert client.get(f"/v1/review/images/{first}").json()["answer"]["reason"] == "cannot_be_graded"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        ('{"grade": 4}', JSON, 422),
        ('{"grade": 1, "reason": "not_a_scalp"}', JSON, 422),
        ("{}", JSON, 422),
        ('{"grade": 1, "reader": "lee"}', JSON, 422),
        ("no json", JSON, 422),
        (b"\xff", JSON, 422),
        ('{"grade": 1}', {"Content-Type": "text/plain"}, 415),
        ('{"grade": 1, "comment": "' + "x" * 70_000 + '"}', JSON, 413),
    ],
)
def test_other_answers_are_refused_and_not_saved(client, session, labels, content, headers, status):
    answer = client.post(f"/v1/review/images/{ids(session)[0]}/answer", content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, "invalid_answer")
    assert "\n" not in answer.json()["detail"]
    assert read_labels(labels) == []


def test_an_image_outside_of_the_queue_is_unknown(client, session, labels):
    assert client.get("/v1/review/images/none").json()["code"] == "unknown_image"
    assert client.post("/v1/review/images/none/answer", json={"grade": 1}).status_code == 404
    assert read_labels(labels) == []


def test_an_answer_that_is_not_stored_is_not_said_to_be_saved(client, session, labels, monkeypatch):
    def full(*_):
        raise UserError("the disk is full; free some")

    first = ids(session)[0]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", full)
        answer = client.post(f"/v1/review/images/{first}/answer", json={"grade": 1})
    assert (answer.status_code, answer.json()["code"]) == (503, "not_saved")
    assert client.get(f"/v1/review/images/{first}").json()["answer"] is None
