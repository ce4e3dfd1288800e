"""An S3 server that is unavailable during a review: answers are refused or wait, and each is stored once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.testclient import TestClient

from jobs.demo_s3 import s3_server
from jobs.review.app import create_app
from scalp_core import storage
from scalp_core.labels.log import LABELS_FOLDER, read_labels
from scalp_core.review.session import Session
from tests.support.reviewing import REVIEW, ids, open_review, write_run

IMAGES = 5


def visit(session: Session) -> TestClient:
    client = TestClient(create_app(session, "secret", 8001), base_url="http://127.0.0.1:8001")
    client.get("/?token=secret")
    return client


def test_answers_wait_for_a_server_that_is_away_or_are_reported_as_not_saved(tmp_path, monkeypatch):
    folder = "s3://scalp/review"
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        graded, labels = write_run(folder, IMAGES), f"{folder}/labels"
        session = open_review(graded, labels)
        client, images = visit(session), ids(session)

        def answer(number: int) -> Any:
            given = {"grade": number % 4, "comment": f"number {number}"}
            return client.post(f"{REVIEW}/images/{images[number]}/answer", json=given)

        assert answer(0).json()["left"] == IMAGES - 1
    with storage.retry_timeout(0.5):
        for refused in (answer(1), client.post(f"{REVIEW}/images/{images[1]}/reveal", json={})):
            assert (refused.status_code, refused.json()["code"]) == (503, "not_saved")
            assert server.secret_key not in refused.text
    shown = client.get(f"{REVIEW}/images/{images[1]}").json()
    assert (shown["answer"], shown["saw_model"]) == (None, False)
    assert client.get(REVIEW).json()["left"] == IMAGES - 1
    with ThreadPoolExecutor(1) as pool, storage.retry_timeout(60):
        waiting = pool.submit(answer, 2)
        with s3_server(tmp_path / "s3", again=server):
            assert waiting.result().json()["answer"]["grade"] == 2
            # The page still has the answer that was not saved: the reader sends it again.
            for number in (1, 3):
                assert answer(number).status_code == 200
            saved = [(label.image_id, label.grade, label.comment) for label in read_labels(labels)]
            assert Counter(saved) == Counter((images[n], n % 4, f"number {n}") for n in range(4))
            assert len(storage.names_in(f"{labels}/{LABELS_FOLDER}")) == 4
            assert ids(open_review(graded, labels)) == images[4:]
