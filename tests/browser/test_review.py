"""The review as readers meet it: the real command, a real browser, the keyboard, touch, and a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from scalp_core.bundles.loading import load_bundle
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.labels.log import Answer, read_labels
from tests.browser.conftest import DESKTOP, PHONE, Open
from tests.browser.steps import is_photo_shown
from tests.browser.test_page_tools import check, in_both_languages_and_schemes
from tests.support.reviewing import open_review, scalp_review, write_run, write_training_images

IMAGES = 14
TABLET = {"width": 820, "height": 1180}
DIFFERENT = (3, 6, 11)  # images on which the second reader differs
REASONS = {5: "u", 9: "n"}
BEFORE = 6  # answers of the first reader before the kill


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("run"), IMAGES)


@pytest.fixture(scope="module")
def with_bundle(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> tuple[str, str]:
    """Output of a bulk run by `bundle`, and prepared data in which copies of its images are."""
    folder = tmp_path_factory.mktemp("of-bundle")
    run = write_run(folder, 4, load_bundle(str(bundle)).spec.model_version)
    return run, write_training_images(folder, 40)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    return str(tmp_path / "labels")


def is_shown(page: Page, place: int, images: int = IMAGES) -> None:
    is_photo_shown(page, place, images)


def key_of(image: int, reader: str) -> str:
    grade = image % 4
    if reader == "lee" and image in DIFFERENT:
        grade = (grade + 1) % 4
    return REASONS.get(image, str(grade))


def answer_all(page: Page, reader: str, images: range, first_place: int = 1) -> None:
    for place, image in enumerate(images, first_place):
        is_shown(page, place, first_place - 1 + len(images))
        page.keyboard.press(key_of(image, reader))
    expect(page.locator("#done")).to_be_visible()


def test_two_readers_answer_by_keyboard_a_third_decides_and_the_log_is_prepared(
    open_page, graded, labels, tmp_path
):
    with scalp_review(graded, labels, "--reader", "kim") as review:
        page = open_page(review.url)
        for image in range(BEFORE):
            is_shown(page, image + 1)
            page.keyboard.press(key_of(image, "kim"))
        is_shown(page, BEFORE + 1)
        review.kill()
        page.keyboard.press(key_of(BEFORE, "kim"))
        expect(page.locator("#problem")).to_contain_text("Not saved.")
        expect(page.locator("#place")).to_have_text(f"Photo {BEFORE + 1} of {IMAGES}")
        page.context.close()
    assert len(read_labels(labels)) == BEFORE  # as many as the page said to be saved
    with scalp_review(graded, labels, "--reader", "kim") as review:
        answer_all(open_page(review.url), "kim", range(BEFORE, IMAGES))
    with scalp_review(graded, labels, "--reader", "lee") as review:
        page = open_page(review.url)
        answer_all(page, "lee", range(IMAGES))
        expect(page.locator("#progress-text")).to_have_text(f"{IMAGES} of {IMAGES} answered")
    with scalp_review(graded, labels, "--reader", "lead", "--adjudicate") as review:
        page = open_page(review.url)
        for place, image in enumerate(DIFFERENT, 1):
            is_shown(page, place, len(DIFFERENT))
            expect(page.locator("#others-list li")).to_have_count(2)
            assert "kim" not in page.content() and "lee" not in page.content()
            page.keyboard.press(key_of(image, "kim"))
        expect(page.locator("#done")).to_be_visible()
    answers = read_labels(labels)
    assert len(answers) == 2 * IMAGES + len(DIFFERENT)
    assert not any(label.saw_model for label in answers)

    data = str(tmp_path / "data")
    summary = prepare(labels, data, Options(), executor=LocalExecutor())
    places = {row["sha256"]: row["label"] for row in manifest.read_manifest(data).to_pylist()}
    session = open_review(graded, labels, answered_too=True)
    image_id, expected = session.describe()["first"], {}
    for image in range(IMAGES):
        if image not in REASONS:
            expected[session.location(image_id).sha256] = image % 4
        image_id = session.image(image_id)["next"]
    assert places == expected
    assert summary["dropped"] == {"cannot_be_graded": 1, "not_a_scalp": 1}
    (pair,) = summary["label_log"]["agreement"]
    assert (pair["graded"], pair["equal"]) == (IMAGES - 2, IMAGES - 2 - len(DIFFERENT))
    assert pair["low"] < pair["qwk"] < pair["high"]


def test_a_tablet_corrects_answers_and_keeps_comments(open_page, graded, labels):
    with scalp_review(graded, labels, "--reader", "kim", "--show-model") as review:
        page = open_page(review.url, viewport=TABLET, has_touch=True)
        is_shown(page, 1)
        expect(page.locator("#model .grade")).to_have_text("good")
        page.get_by_label("Comment").fill("wet hair")
        page.get_by_role("button", name="moderate").tap()
        is_shown(page, 2)
        expect(page.locator("#saved")).to_have_text("Saved: moderate")
        page.get_by_label("Comment").fill("not answered yet")
        page.get_by_role("button", name="Previous").tap()
        is_shown(page, 1)
        expect(page.get_by_label("Comment")).to_have_value("wet hair")
        expect(page.get_by_role("button", name="moderate")).to_have_attribute("aria-pressed", "true")
        page.get_by_label("Comment").fill("wet hair, blurred")
        page.get_by_role("button", name="Cannot be graded").tap()
        is_shown(page, 2)
        expect(page.get_by_label("Comment")).to_have_value("not answered yet")
        page.get_by_role("button", name="Not a scalp").tap()
        is_shown(page, 3)
        small = page.locator(".answer").evaluate_all(
            "all => all.filter((each) => each.getBoundingClientRect().height < 44)"
        )
        assert small == []
    given = [(label.grade, label.reason, label.comment, label.saw_model) for label in read_labels(labels)]
    assert given[0] == (2, None, "wet hair", True)
    # Leaving the field saves the corrected comment of an answered photo.
    assert given[-2:] == [
        (None, "cannot_be_graded", "wet hair, blurred", True),
        (None, "not_a_scalp", "not answered yet", True),
    ]


def test_keys_in_a_comment_are_text_and_a_korean_layout_works(open_page, graded, labels):
    with scalp_review(graded, labels, "--reader", "kim") as review:
        page = open_page(review.url)
        is_shown(page, 1)
        page.keyboard.press("c")
        page.keyboard.type("n2 u")
        page.keyboard.press("Escape")
        expect(page.locator("#place")).to_have_text(f"Photo 1 of {IMAGES}")
        # The key N with a Korean layout.
        page.evaluate(
            "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'ㅜ', code: 'KeyN', bubbles: true }))"
        )
        is_shown(page, 2)
        page.keyboard.press("ArrowRight")
        is_shown(page, 3)
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        is_shown(page, 1)
        expect(page.get_by_label("Comment")).to_have_value("n2 u")
    (label,) = read_labels(labels)
    assert (label.reason, label.comment) == ("not_a_scalp", "n2 u")


def test_a_reader_may_ask_for_the_view_of_the_model_and_the_answer_is_marked(
    open_page, with_bundle, bundle, labels
):
    graded, data = with_bundle
    with scalp_review(
        graded, labels, "--reader", "kim", "--bundle", str(bundle), "--neighbors", data
    ) as review:
        page = open_page(review.url)
        heat, neighbors = page.locator("#heat"), page.locator("#neighbors-list li")
        is_shown(page, 1, 4)
        expect(heat).to_be_hidden()
        expect(page.locator("#neighbors")).to_be_hidden()
        expect(page.locator("#aids-note")).to_contain_text("Look for yourself first")
        page.keyboard.press("1")
        is_shown(page, 2, 4)
        plain = page.locator("#view").screenshot()
        page.keyboard.press("h")
        expect(heat).to_be_visible()
        assert page.locator("#view").screenshot() != plain
        expect(page.locator("#aids-note")).to_contain_text("is marked “saw the model” from now on")
        assert heat.bounding_box() == page.locator("#picture").bounding_box()  # squashed, as the model saw it
        page.keyboard.press("h")
        expect(heat).to_be_hidden()
        page.keyboard.press("s")
        expect(neighbors).to_have_count(6)
        for neighbor in neighbors.all():
            expect(neighbor.locator("img")).to_have_js_property("naturalWidth", 320)
        page.keyboard.press("h")
        expect(heat).to_be_visible()
        page.keyboard.press("2")
        is_shown(page, 3, 4)  # hidden again: the reader's own look comes first
        expect(heat).to_be_hidden()
        expect(page.locator("#neighbors")).to_be_hidden()
        expect(page.locator("#aids-note")).to_contain_text("Look for yourself first")
        page.keyboard.press("3")
        is_shown(page, 4, 4)
    given = [(label.grade, label.saw_model) for label in read_labels(labels)]
    assert given == [(1, False), (2, True), (3, False)]


def test_everyone_can_use_the_view_of_the_model(open_page, with_bundle, bundle, labels, tmp_path):
    graded, data = with_bundle
    words = ("--reader", "kim", "--bundle", str(bundle), "--neighbors", data)
    with scalp_review(graded, labels, *words) as review:
        check_view(open_page, review.url, DESKTOP, tmp_path)
        check_view(open_page, review.url, TABLET, tmp_path)
        check_view(open_page, review.url, PHONE, tmp_path)


def check_view(open_page: Open, url: str, viewport: dict[str, int], pictures: Path) -> None:
    """Check the page with heatmap and similar images, in a window of this size."""
    page = open_page(url, viewport=viewport, bypass_csp=True, has_touch=True)  # for axe
    is_shown(page, 1, 4)
    axe = Axe()
    check(axe, page, pictures / "first.png")
    page.get_by_role("button", name="Heatmap").tap()
    expect(page.get_by_role("button", name="Heatmap")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Similar training photos").tap()
    expect(page.get_by_role("list", name="Similar training photos").get_by_role("img")).to_have_count(6)
    for name in in_both_languages_and_schemes(page):
        check(axe, page, pictures / f"{name}.png")
    small = page.locator("#aids button").evaluate_all(
        "all => all.filter((each) => each.getBoundingClientRect().height < 44)"
    )
    assert small == []
    page.context.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everyone_can_use_it(open_page, graded, labels, tmp_path, viewport):
    for reader, shift in (("kim", 0), ("lee", 1)):
        session = open_review(graded, labels, reader)
        image = session.describe()["first"]
        session.answer(image, Answer(grade=shift))
    with scalp_review(graded, labels, "--reader", "lead", "--adjudicate", "--show-model") as review:
        page = open_page(review.url, viewport=viewport, bypass_csp=True)  # for axe, put into the page
        is_shown(page, 1, 1)
        axe = Axe()
        for name in in_both_languages_and_schemes(page):
            check(axe, page, tmp_path / f"{name}.png")
        page.keyboard.press("1")
        expect(page.locator("#done")).to_be_visible()
        check(axe, page, tmp_path / "done.png")
