"""The page as a person meets it: a real browser, the real endpoint, nothing else on the network."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from scalp_core.errors import IMAGE_CODES
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.inference.decision import REASONS
from tests.browser.conftest import DESKTOP, PHONE
from tests.browser.steps import answer_of, choose, drop, photograph, refuse, scrolls_sideways
from tests.support.images import jpeg


def check_result(page: Page, answer: dict, names: tuple[str, ...] = GRADE_NAMES) -> None:
    result = page.locator("#result")
    expect(result.locator(".grade")).to_have_text(names[answer["grade"]])
    expect(result.locator(".bars li")).to_have_count(4)
    for row, name, probability in zip(
        result.locator(".bars li").all(), names, answer["probabilities"], strict=True
    ):
        expect(row.locator(".label")).to_have_text(name)
        expect(row.locator(".percent")).to_have_text(f"{100 * probability:.1f}%")
    low, high = (names[answer["grade_set"][end]] for end in (0, -1))
    expect(result.locator('[data-slot="set"]')).to_contain_text(low)
    expect(result.locator('[data-slot="set"]')).to_contain_text(high)
    referral = result.locator('[data-slot="referral"]')
    assert ("refer" in referral.get_attribute("class").split()) == answer["refer"]
    expect(referral.locator("li")).to_have_count(len(answer["refer_reasons"]))
    expect(result.locator('[data-slot="image"]')).to_contain_text(answer["image_id"])
    expect(result).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize(
    ("viewport", "locale", "names", "no_diagnosis"),
    [
        (DESKTOP, "en-US", GRADE_NAMES, "Not a diagnosis."),
        (PHONE, "ko-KR", GRADE_NAMES_KO, "진단이 아닙니다."),
    ],
    ids=["desktop", "phone"],
)
def test_a_chosen_photograph_is_graded(visit, origin, viewport, locale, names, no_diagnosis):
    page = visit(viewport=viewport, locale=locale)
    expect(page.get_by_text(no_diagnosis, exact=True)).to_be_visible()
    assert page.locator("html").get_attribute("lang") == locale[:2]
    data = jpeg(3)
    choose(page, photograph(data))
    answer = answer_of(origin, data)
    check_result(page, answer, names)
    expect(page.locator("#photograph")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text(f"a.jpg: {names[answer['grade']]}")
    expect(page.locator("#model")).to_contain_text(answer["model_version"])
    assert not scrolls_sideways(page)


def test_many_photographs_are_graded_and_none_is_lost(visit, origin):
    page = visit(viewport=PHONE)
    held: list[Route] = []  # until the page has shown how far it is
    page.route("**/v1/grade", lambda route: held.append(route))
    good = {f"{seed}.jpg": jpeg(seed, (160, 120)) for seed in range(5)}
    good["=cmd.jpg"] = jpeg(9, (160, 120))
    files = [photograph(data, name) for name, data in good.items()]
    files.insert(2, photograph(b"no photograph", "note.jpg"))
    page.set_input_files("#file", files)
    expect(page.locator("#progress-text")).to_have_text("0 of 7 processed")
    expect(page.locator(".tile[data-status=sending]")).to_have_count(3)
    while len(held) < 3:  # the browser tells of them when it is listened to
        page.wait_for_timeout(50)
    page.route("**/v1/grade", lambda route: route.continue_())
    for route in held:
        route.continue_()
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#summary")).to_have_text(re.compile(r"^7 photos: .*1 not graded\.$"))
    expect(page.locator("#announcer")).to_have_text(re.compile("^Finished. 7 photos"))
    expect(page.locator(".tile", has_text="note.jpg")).to_contain_text("not graded")
    assert not scrolls_sideways(page)

    page.locator(".tile", has_text="note.jpg").click()
    expect(page.locator("#verdict")).to_contain_text("This file is not a photo.")
    expect(page.locator("#verdict")).to_contain_text("not_an_image")
    expect(page.locator("#view")).to_be_hidden()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    text = Path(download.value.path()).read_text(encoding="utf-8-sig")
    rows = {row["file"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert rows.keys() == {name.replace("=", "'=") for name in good} | {"note.jpg"}
    assert rows["note.jpg"]["status"] == "failed"
    assert rows["note.jpg"]["error_code"] == "not_an_image"
    answer = answer_of(origin, good["3.jpg"])
    assert rows["3.jpg"]["sha256"] == answer["sha256"]
    assert rows["3.jpg"]["grade_name"] == answer["grade_name"]
    assert [float(rows["3.jpg"][f"probability_{grade}"]) for grade in range(4)] == answer["probabilities"]
    assert rows["3.jpg"]["grade_set"] == " ".join(map(str, answer["grade_set"]))


def test_a_dropped_photograph_is_the_selected_one(visit, origin):
    page = visit()
    first, second = jpeg(4), jpeg(5)
    drop(page, first, "a.jpg", "image/jpeg")
    check_result(page, answer_of(origin, first))
    drop(page, second, "b.jpg", "image/jpeg")
    check_result(page, answer_of(origin, second))
    expect(page.locator("#name")).to_have_text("b.jpg")
    expect(page.locator(".tile")).to_have_count(2)


def test_a_photograph_above_the_limit_is_refused_in_words(visit):
    page = visit()
    page.evaluate(
        """(size) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(size)], "a.jpg", { type: "image/jpeg" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
        }""",
        34 * 2**20,
    )
    expect(page.locator("#verdict")).to_contain_text("The file is too large; the limit is 32 MB.")


def test_the_keyboard_is_enough(visit):
    page = visit()
    # Listening early makes the browser hand over the chooser; at the key press it may be too late.
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the result")).to_be_focused()
    for name in ("English", "한국어"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose photos")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    with page.expect_file_chooser():
        page.keyboard.press("Space")

    choose(page, *(photograph(jpeg(seed, (160, 120)), f"{seed}.jpg") for seed in range(5)))
    page.locator(".tile").first.focus()
    for key, name in (("ArrowRight", "1"), ("ArrowDown", "4"), ("ArrowUp", "1"), ("End", "4"), ("Home", "0")):
        page.keyboard.press(key)
        expect(page.locator("#name")).to_have_text(f"{name}.jpg")
        expect(page.locator(".tile[aria-current=true]")).to_be_focused()
    assert page.locator(".tile[tabindex='0']").count() == 1
    page.get_by_role("button", name="Remove", exact=True).press("Enter")
    expect(page.locator(".tile")).to_have_count(4)
    expect(page.locator("#name")).to_have_text("1.jpg")
    expect(page.locator("#announcer")).to_have_text("0.jpg removed")


def test_the_language_is_switched_and_remembered(visit, origin):
    page = visit(locale="ko-KR")
    data = jpeg(6)
    choose(page, photograph(data), photograph(b"", "empty.jpg"))
    answer = answer_of(origin, data)
    check_result(page, answer, GRADE_NAMES_KO)
    page.get_by_role("button", name="English").click()
    check_result(page, answer, GRADE_NAMES)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.locator(".tile", has_text="empty.jpg").click()
    expect(page.locator("#verdict")).to_contain_text("The file is empty.")
    page.get_by_role("button", name="한국어").click()
    expect(page.locator("#verdict")).to_contain_text("빈 파일입니다.")
    page.get_by_role("button", name="English").click()
    page.reload()
    expect(page.get_by_role("heading", name="Scalp photo grading")).to_be_visible()


def test_both_languages_say_everything(visit):
    page = visit()
    english, korean = (
        page.evaluate(f"import('/page/{name}.js').then((module) => module.{name.upper()})")
        for name in ("english", "korean")
    )
    plain = {key for key in english if not key.endswith(".one")}  # Korean has no plural
    assert plain == korean.keys()
    places = re.compile(r"\{\w+\}")
    assert {key: set(places.findall(english[key])) for key in plain} == {
        key: set(places.findall(korean[key])) for key in plain
    }
    assert {f"reason.{reason}" for reason in REASONS} <= plain
    of_archives = {"not_found", "fetch_failed", "bad_archive", "nested_archive", "bad_name"}
    of_jobs = {"changed", "crashed", "internal_error", "outside_link"}
    assert {f"problem.{code}" for code in IMAGE_CODES.keys() - of_archives - of_jobs} <= plain
    named = page.evaluate(
        """[document, ...[...document.querySelectorAll("template")].map(({ content }) => content)]
            .flatMap((root) => [...root.querySelectorAll("*")])
            .flatMap(({ dataset }) => [dataset.say, dataset.label]).filter(Boolean)"""
    )
    assert set(named) <= plain


@pytest.mark.parametrize(
    ("locale", "told"),
    [
        ("en-US", "This model was trained on synthetic images. Not for clinical use."),
        ("ko-KR", "이 모델은 합성 이미지로 학습되었습니다. 임상에 사용하지 마세요."),
    ],
)
def test_a_model_of_synthetic_images_says_so(visit, locale, told):
    def drawn(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "synthetic": True})

    page = visit(lambda page: page.route("**/v1/model", drawn), viewport=PHONE, locale=locale)
    expect(page.get_by_text(told)).to_be_visible()
    other = visit(locale=locale)
    expect(other.locator("#model")).to_contain_text("untrained")
    expect(other.locator("#synthetic")).to_be_hidden()


def test_a_busy_server_is_asked_again_and_a_failure_can_be_tried_again(visit, origin):
    page = visit(lambda page: page.clock.install())
    page.route("**/v1/grade", refuse(503, "overloaded", Retry_After="7"))
    data = jpeg(7)
    page.set_input_files("#file", photograph(data))
    for attempt in range(2, 6):
        note = f"The server is busy. Trying again in 7 s (attempt {attempt} of 5)."
        expect(page.get_by_text(note)).to_be_visible()
        page.clock.fast_forward(7_000)
    expect(page.locator("#verdict")).to_contain_text("The server has too much to do.")
    expect(page.locator("#wait")).to_be_hidden()
    page.unroute("**/v1/grade")
    page.route("**/v1/grade", refuse(500, "new_code"))
    page.get_by_role("button", name="Try again", exact=True).click()
    expect(page.locator("#verdict")).to_contain_text("new_code in the server's words")
    page.unroute("**/v1/grade")
    page.get_by_role("button", name="Try the failed ones again").click()
    check_result(page, answer_of(origin, data))


def test_the_key_is_asked_for_where_the_server_wants_one(visit, origin):
    def guard(route: Route) -> None:
        sent = route.request.headers.get("authorization")
        if sent == "Bearer right":
            route.continue_()
        else:
            refuse(401, "wrong_key" if sent else "no_key")(route)

    page = visit()
    field = page.get_by_label("Access key")
    expect(page.locator("#model")).to_contain_text("untrained")
    expect(field).to_be_hidden()

    page.route("**/v1/**", guard)
    data = jpeg(8)
    page.set_input_files("#file", [photograph(data), photograph(jpeg(9), "b.jpg")])
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_text("The server does not know this key.")).to_be_visible()
    expect(field).to_be_focused()
    field.fill("right")
    page.get_by_role("button", name="Use this key").click()
    check_result(page, answer_of(origin, data))
    expect(field).to_be_hidden()
    page.reload()
    expect(page.locator("#model")).to_contain_text("untrained")  # it is kept in the tab
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
