"""The page as a person meets it: a real browser, the real endpoint, nothing else on the network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from cluster.local import Cluster
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from serving import app
from serving.settings import Settings
from tests.browser.conftest import DESKTOP, PHONE
from tests.conftest import free_port, jpeg


@pytest.fixture(scope="module")
def origin(bundle: Path, cluster: Cluster) -> Iterator[str]:
    port = free_port()
    app.start(str(bundle), "127.0.0.1", port, Settings(device="cpu"))
    yield f"http://127.0.0.1:{port}"
    app.stop()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, origin: str) -> Iterator[Page]:
    """The open page; afterwards, that it asked no other host and that its console has no error."""
    context = browser.new_context(viewport=request.param, locale="ko-KR")
    page = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(origin)
    yield page
    context.close()
    own = (f"{origin}/", f"blob:{origin}/", "data:")
    assert [url for url in requests if not url.startswith(own)] == []
    # A refused photograph is a 4xx answer, which the browser itself reports in the console.
    assert [error for error in errors if "the server responded with a status of 4" not in error] == []


def answer_of(origin: str, data: bytes) -> dict:
    return httpx.post(f"{origin}/v1/grade", files={"file": data}, timeout=60).raise_for_status().json()


def check_result(page: Page, answer: dict) -> None:
    result = page.locator("#result")
    expect(result.locator(".grade")).to_have_text(f"{answer['grade_name']} {GRADE_NAMES_KO[answer['grade']]}")
    expect(result.locator(".bars li")).to_have_count(4)
    for row, name, name_ko, probability in zip(
        result.locator(".bars li").all(), GRADE_NAMES, GRADE_NAMES_KO, answer["probabilities"], strict=True
    ):
        expect(row.locator(".label")).to_have_text(f"{name} {name_ko}")
        expect(row.locator(".percent")).to_have_text(f"{100 * probability:.1f} %")
    low, high = answer["grade_set"][0], answer["grade_set"][-1]
    expect(result.locator('[data-slot="set"]')).to_contain_text(
        f"{GRADE_NAMES[low]} to {GRADE_NAMES[high]}" if low < high else f"{GRADE_NAMES[low]} alone"
    )
    expect(result.locator('[data-slot="referral"]')).to_contain_text(
        "A person should look" if answer["refer"] else "No referral"
    )
    expect(result.locator('[data-slot="image"]')).to_have_text(answer["image_id"])
    expect(result).to_have_attribute("aria-busy", "false")


def drop(page: Page, data: bytes, name: str, kind: str) -> None:
    """A real drop event with a file, as the operating system's file manager makes it."""
    transfer = page.evaluate_handle(
        """([text, name, type]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})


def test_a_chosen_photograph_is_graded(page, origin, tmp_path):
    expect(page.get_by_text("Not a diagnosis.")).to_be_visible()
    data = jpeg(3)
    page.get_by_label("Choose a photograph").set_input_files(
        {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": data}
    )
    answer = answer_of(origin, data)
    check_result(page, answer)
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#model")).to_contain_text(answer["model_version"])
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
    page.screenshot(path=tmp_path / "graded.png", full_page=True)


def test_a_dropped_photograph_replaces_the_one_before(page, origin):
    first, second = jpeg(4), jpeg(5)
    drop(page, first, "a.jpg", "image/jpeg")
    check_result(page, answer_of(origin, first))
    drop(page, second, "b.jpg", "image/jpeg")
    check_result(page, answer_of(origin, second))


def test_a_text_is_refused_in_words(page, origin, tmp_path):
    drop(page, b"no photograph", "note.txt", "text/plain")
    failure = page.locator("#result .failure")
    expect(failure).to_contain_text("Not graded")
    expect(failure).to_contain_text("the bytes are none of JPEG, PNG, WebP, BMP, TIFF")
    expect(failure).to_contain_text("not_an_image")
    expect(page.locator("#preview")).to_be_hidden()
    page.screenshot(path=tmp_path / "refused.png", full_page=True)
    data = jpeg(6)
    drop(page, data, "a.jpg", "image/jpeg")  # and the page goes on
    check_result(page, answer_of(origin, data))


def test_a_photograph_above_the_limit_is_refused_in_words(page):
    drop_size = 34 * 2**20
    page.evaluate(
        """(size) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(size)], "a.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }""",
        drop_size,
    )
    expect(page.locator("#result .failure")).to_contain_text("too_many_bytes", timeout=20_000)


def test_the_keyboard_reaches_the_file_field(page):
    # Listening early makes the browser hand over the chooser; at the key press it may be too late.
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser():
        page.keyboard.press("Space")
