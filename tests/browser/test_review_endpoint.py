"""The review of the endpoint as a clinic uses it: readers with keys, a kill, a decision, a data set."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.labels.log import read_labels
from serving.auth.keys import KeySettings
from serving.schemas.review import ReviewSettings
from serving.settings import Settings
from tests.browser.steps import enter_key, is_photo_shown
from tests.browser.test_page_tools import check
from tests.support.ports import free_port
from tests.support.replica import replica_process
from tests.support.reviewing import open_review, write_keys, write_run

IMAGES = 8
BEFORE = 4  # answers of the first reader before the kill, and one less of the second
DIFFERENT = (2, 6)  # images on which the second reader differs
SCOPES = {"kim": "review", "lee": "review", "park": "adjudicate", "ann": "grade"}


def answer(page: Page, images: range, shift: int = 0) -> None:
    """Answer images by keyboard; the grade of an image is its number modulo 4, shifted for `DIFFERENT`."""
    for place, image in enumerate(images, 1):
        is_photo_shown(page, place, IMAGES - images.start)
        page.keyboard.press(str((image + shift * (image in DIFFERENT)) % 4))


def test_readers_answer_with_their_keys_and_a_killed_endpoint_loses_nothing(open_page, bundle, tmp_path):
    graded, labels = write_run(tmp_path, IMAGES), str(tmp_path / "labels")
    keys, port = write_keys(tmp_path / "keys", **SCOPES), free_port()
    settings = Settings(
        device="cpu",
        keys=KeySettings(file=str(tmp_path / "keys")),
        review=ReviewSettings(graded=graded, labels=labels),
    )
    url, requested = f"http://127.0.0.1:{port}/review", []
    with replica_process(bundle, settings, tmp_path, port) as endpoint:
        first = open_page(url, bypass_csp=True)  # for axe
        first.on("request", lambda request: requested.append(request.url))
        expect(first.get_by_label("Access key", exact=True)).to_be_focused()
        check(Axe(), first, tmp_path / "key.png")
        enter_key(first, keys["ann"])
        expect(first.get_by_text("This key does not allow this page.")).to_be_visible()
        enter_key(first, keys["kim"])
        expect(first.locator("#reader")).to_have_text("Reader: kim")
        for image in range(BEFORE):
            is_photo_shown(first, image + 1, IMAGES)
            first.keyboard.press(str(image % 4))
        is_photo_shown(first, BEFORE + 1, IMAGES)
        second = open_page(url)
        enter_key(second, keys["lee"])
        expect(second.locator("#progress-text")).to_have_text(f"0 of {IMAGES} answered")
        assert second.locator('[aria-pressed="true"].answer').count() == 0  # kim's answer is not shown
        for image in range(BEFORE - 1):
            is_photo_shown(second, image + 1, IMAGES)
            second.keyboard.press(str((image + (image in DIFFERENT)) % 4))
        is_photo_shown(second, BEFORE, IMAGES)
        endpoint.kill()
        first.keyboard.press("0")
        expect(first.locator("#problem")).to_contain_text("Not saved.")
        expect(first.locator("#place")).to_have_text(f"Photo {BEFORE + 1} of {IMAGES}")
    saved = sorted(label.reader for label in read_labels(labels))
    assert saved == ["kim"] * BEFORE + ["lee"] * (BEFORE - 1)  # as many as the pages said

    with replica_process(bundle, settings, tmp_path, port):
        # The first page goes on, the second is opened again: neither shows an answered image.
        first.keyboard.press(str(BEFORE % 4))
        answer_rest(first, BEFORE)
        second.reload()
        expect(second.locator("#reader")).to_have_text("Reader: lee")
        answer(second, range(BEFORE - 1, IMAGES), shift=1)
        expect(second.get_by_text("All photos are answered")).to_be_visible()
        second.get_by_role("button", name="Change reader").click()
        enter_key(second, keys["park"])
        expect(second.locator("#reader")).to_have_text("Deciding between readers: park")
        for place, image in enumerate(DIFFERENT, 1):
            is_photo_shown(second, place, len(DIFFERENT))
            expect(second.locator("#others-list li")).to_have_count(2)
            assert "kim" not in second.content() and "lee" not in second.content()
            second.keyboard.press(str(image % 4))
        expect(second.locator("#done")).to_be_visible()

    answers = read_labels(labels)
    assert len(answers) == 2 * IMAGES + len(DIFFERENT)
    assert not any(label.saw_model for label in answers)
    assert not [url for url in requested if any(key in url for key in keys.values())]
    data = str(tmp_path / "data")
    prepare(labels, data, Options(), executor=LocalExecutor())
    prepared = {row["sha256"]: row["label"] for row in manifest.read_manifest(data).to_pylist()}
    session = open_review(graded, labels, answered_too=True)
    image_id, expected = session.describe()["first"], {}
    for image in range(IMAGES):
        expected[session.location(image_id).sha256] = image % 4
        image_id = session.image(image_id)["next"]
    assert prepared == expected


def answer_rest(page: Page, answered: int) -> None:
    """Answer the images after one that a page showed before the endpoint was killed."""
    for place, image in enumerate(range(answered + 1, IMAGES), 2):
        is_photo_shown(page, place, IMAGES - answered)
        page.keyboard.press(str(image % 4))
    expect(page.locator("#done")).to_be_visible()
