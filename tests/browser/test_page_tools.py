"""What the page does beside grading: heat, comparison, camera; and that everyone can use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Response, Route, expect

from scalp_core.grades import GRADE_NAMES
from tests.browser.conftest import DESKTOP, PHONE
from tests.browser.steps import answer_of, changed, choose, photograph, refuse, scrolls_sideways
from tests.support.images import jpeg


def boxes(page: Page) -> tuple[dict[str, float], dict[str, float]]:
    """Where the photograph and where the heat lie."""
    return tuple(
        page.locator(name).evaluate("(e) => e.getBoundingClientRect().toJSON()")
        for name in ("#view", "#heat")
    )


def test_heat_is_laid_over_the_photograph(visit, origin):
    page = visit()
    answers: list[Response] = []
    page.on("response", lambda response: answers.append(response) if "grade" in response.url else None)
    data = jpeg(3)
    choose(page, photograph(data))
    page.get_by_label("Show where the model looked").check()
    expect(page.locator("#heat")).to_be_visible()
    expect(page.get_by_text("not where the lesion is")).to_be_visible()
    view, heat = boxes(page)
    assert heat == view  # squash: the square is the whole photograph
    likeliest = answer_of(origin, data)
    alt = "Heatmap for the grade {}, over the photo"
    expect(page.locator("#heat")).to_have_attribute("alt", alt.format(likeliest["grade_name"]))
    page.get_by_label("Opacity").fill("20")
    expect(page.locator("#heat")).to_have_css("opacity", "0.2")
    other = (likeliest["grade"] + 1) % 4
    page.get_by_label("Heatmap for", exact=True).select_option(GRADE_NAMES[other])
    expect(page.locator("#heat")).to_have_attribute("alt", alt.format(GRADE_NAMES[other]))
    expect(page.locator("#heat")).to_be_visible()
    page.get_by_label("Heatmap for", exact=True).select_option("likeliest grade")
    expect(page.locator("#heat")).to_be_visible()
    grades = [answer.json().get("heatmap", {}).get("grade") for answer in answers]
    assert grades == [None, likeliest["grade"], other]  # the likeliest one's was kept


@pytest.mark.parametrize(
    ("resize", "width", "height"), [("crop", 3 / 4, 1), ("pad", 1, 4 / 3)], ids=["crop", "pad"]
)
def test_heat_lies_where_the_model_saw_the_photograph(visit, origin, resize, width, height):
    model = {"size": 64, "resize": resize, "mean": [0.5] * 3, "std": [0.5] * 3}
    page = visit(lambda page: page.route("**/v1/model", changed(preprocess=model)))
    choose(page, photograph(jpeg(3)))
    page.get_by_label("Show where the model looked").check()
    expect(page.locator("#heat")).to_be_visible()
    view, heat = boxes(page)
    assert heat["width"] == pytest.approx(width * view["width"], abs=1)
    assert heat["height"] == pytest.approx(height * view["height"], abs=1)
    for low, high in (("left", "right"), ("top", "bottom")):
        assert heat[low] + heat[high] == pytest.approx(view[low] + view[high], abs=1)  # same middle


def test_no_heat_is_said_in_words(visit):
    page = visit()
    choose(page, photograph(jpeg(3)))
    page.route("**/v1/grade", changed(heatmap=None))
    page.get_by_label("Show where the model looked").check()
    expect(page.get_by_text("This server does not make heatmaps.")).to_be_visible()
    page.unroute("**/v1/grade")
    page.route("**/v1/grade", refuse(422, "no_heatmap"))
    page.get_by_label("Heatmap for", exact=True).select_option("mild")
    expect(page.get_by_text("No heatmap. A model of this architecture cannot show")).to_be_visible()


@pytest.mark.parametrize(
    ("locale", "heading", "lines"),
    [
        ("en-US", "Other symptoms", ["Dandruff severe 70%", "Hair loss good 85%"]),
        ("ko-KR", "다른 증상", ["비듬 중증 70%", "탈모 양호 85%"]),
    ],
)
def test_a_model_of_several_symptoms_lists_the_others(visit, locale, heading, lines):
    others = {
        "dandruff": {"grade": 3, "grade_name": "severe", "probabilities": [0.1, 0.1, 0.1, 0.7]},
        "hair_loss": {"grade": 0, "grade_name": "good", "probabilities": [0.85, 0.05, 0.05, 0.05]},
    }
    page = visit(lambda page: page.route("**/v1/grade", changed(other_symptoms=others)), locale=locale)
    choose(page, photograph(jpeg(3)))
    expect(page.get_by_role("heading", name=heading)).to_be_visible()
    items = page.locator(".others li")
    expect(items).to_have_count(2)
    assert [" ".join(text.split()) for text in items.all_inner_texts()] == lines
    assert not scrolls_sideways(page)
    page.route("**/v1/grade", changed(other_symptoms=None))
    choose(page, photograph(jpeg(4)))
    expect(page.get_by_role("heading", name=heading)).to_have_count(0)


def graded_as(grade: int, severity: float, **fields: object) -> dict[str, object]:
    return {"grade": grade, "expected_severity": severity, "grade_set": [grade], "refer": False} | fields


def test_two_photographs_are_compared(visit):
    page = visit()
    answers = [graded_as(2, 2.31), graded_as(1, 0.87, refer=True), graded_as(1, 0.9, grade_set=[1, 2])]

    def handle(route: Route) -> None:
        changed(**answers.pop(0))(route)

    page.route("**/v1/grade", handle)
    for name in ("may.jpg", "june.jpg", "july.jpg"):
        choose(page, photograph(jpeg(3), name))
    page.get_by_role("button", name="Compare two").click()
    expect(page.get_by_role("heading", name="Before and after")).to_be_focused()
    compare = page.locator("#compare")
    expect(compare).to_contain_text("Expected severity fell by 1.41, from 2.31 to 0.90.")
    expect(compare).to_contain_text("The grade sets overlap")
    compare.get_by_label("After").select_option("2. june.jpg (mild)")
    expect(compare).to_contain_text("Expected severity fell by 1.44, from 2.31 to 0.87.")
    expect(compare).to_contain_text("The grade sets do not overlap.")
    expect(compare).to_contain_text("A person should look at: After.")
    compare.get_by_role("button", name="Swap").click()
    expect(compare).to_contain_text("Expected severity rose by 1.44, from 0.87 to 2.31.")
    expect(page.locator("#announcer")).to_contain_text("mild before, moderate after.")

    compare.get_by_role("button", name="Slider").click()
    slider = compare.get_by_label("Visible share of the photo “before”")
    slider.focus()
    slider.press("End")
    expect(page.locator("#after-figure")).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    expect(slider).to_have_value("25")

    compare.get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="Compare two")).to_be_focused()


def test_the_camera_takes_photographs(visit):
    page = visit(viewport=PHONE)
    page.get_by_role("button", name="Take a photo").click()
    shutter = page.get_by_role("button", name="Take the photo")
    expect(shutter).to_be_enabled()
    assert page.evaluate("document.querySelector('video').videoWidth") > 0
    shutter.click()
    expect(page.get_by_text("1 photo taken")).to_be_visible()
    assert not scrolls_sideways(page)
    track = page.evaluate_handle("document.querySelector('video').srcObject.getTracks()[0]")
    page.get_by_role("button", name="Done").click()
    page.wait_for_function("(track) => track.readyState === 'ended'", arg=track)  # its light goes out
    expect(page.locator("#result .grade")).to_be_visible()
    expect(page.get_by_role("button", name="Take a photo")).to_be_focused()


# Cameras open when the test says so, as slow ones do; `opened` keeps their tracks by device.
SLOW_CAMERAS = """() => {
    const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    window.opened = [];
    window.waiting = {};
    navigator.mediaDevices.getUserMedia = async ({ video }) => {
        const device = video.deviceId?.exact ?? "first";
        await new Promise((resolve) => { window.waiting[device] = resolve; });
        const stream = await open({ video: true });
        window.opened.push(stream.getTracks()[0]);
        return stream;
    };
    window.choose = (device) => {
        const select = document.getElementById("camera-device");
        select.replaceChildren(new Option(device, device));
        select.dispatchEvent(new Event("change"));
    };
}"""
LIVE = "opened.filter(({ readyState }) => readyState === 'live').length"


def open_camera(page: Page, device: str, opened: int) -> None:
    page.wait_for_function("(device) => waiting[device]", arg=device)
    page.evaluate("(device) => waiting[device]()", device)
    page.wait_for_function("(count) => opened.length === count", arg=opened)


def test_one_camera_is_on_when_the_device_is_changed_quickly_and_none_when_closed(visit):
    page = visit()
    page.evaluate(SLOW_CAMERAS)
    page.get_by_role("button", name="Take a photo").click()
    open_camera(page, "first", 1)
    shutter = page.get_by_role("button", name="Take the photo")
    expect(shutter).to_be_enabled()
    page.evaluate("choose('a'); choose('b')")
    open_camera(page, "b", 2)
    expect(shutter).to_be_enabled()
    open_camera(page, "a", 3)
    page.wait_for_function(f"{LIVE} === 1")
    assert page.evaluate("opened[1].readyState") == "live"
    expect(shutter).to_be_enabled()
    page.evaluate("choose('late')")
    page.get_by_role("button", name="Done").click()
    open_camera(page, "late", 4)
    page.wait_for_function(f"{LIVE} === 0")


def test_without_a_camera_the_device_has_its_own(visit):
    page = visit()
    page.on("filechooser", lambda _: None)
    page.evaluate(
        """() => {
            const refused = new DOMException("", "NotAllowedError");
            navigator.mediaDevices.getUserMedia = () => Promise.reject(refused);
        }"""
    )
    page.get_by_role("button", name="Take a photo").click()
    expect(page.get_by_text("The browser may not use the camera.")).to_be_visible()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Use the device's own camera").click()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files(photograph(jpeg(3)))
    expect(page.locator("#result .grade")).to_be_visible()
    # And so at once where the page may not ask for one at all, as without TLS.
    page.evaluate("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    with page.expect_file_chooser():
        page.get_by_role("button", name="Take a photo").click()


def test_the_page_states_what_the_model_is(visit):
    interval = {"qwk": {"low": 0.864, "high": 0.944}}
    metrics = {"val": {"n": 1272, "top1": 0.836, "qwk": 0.9213, "intervals": interval}}
    page = visit(lambda page: page.route("**/v1/model", changed(metrics=metrics, synthetic=True)))
    page.get_by_text("About this AI model").click()
    rows = page.locator("#about-rows")
    expect(rows).to_contain_text("Synthetic images")
    expect(rows).to_contain_text("84% of 1272 validation photos")
    expect(rows).to_contain_text("kappa 0.92 (95 % interval 0.86 to 0.94)")
    expect(rows).to_contain_text("Not a diagnosis.")
    expect(page.locator("#subtitle")).to_contain_text("micro-keratin (fine flaking)")
    page.get_by_role("button", name="한국어").click()
    expect(rows).to_contain_text("검증용 사진 1272장 중 84%")
    page.route("**/v1/model", changed(other_symptoms=["dandruff", "hair_loss"]))
    page.reload()
    expect(rows).to_contain_text("네 등급으로 평가합니다: 미세각질, 비듬, 탈모.")
    expect(page.locator("#subtitle")).to_contain_text("미세각질의 중증도")
    page.route("**/v1/model", changed(symptom="dandruff"))
    page.reload()
    expect(rows).to_contain_text("네 등급으로 평가합니다: 비듬.")
    expect(page.locator("#subtitle")).to_contain_text("증상의 중증도")


def test_a_result_is_printed_with_the_model_and_without_controls(visit):
    page = visit()
    choose(page, photograph(jpeg(3)))
    page.evaluate("window.print = () => dispatchEvent(new Event('beforeprint'))")
    page.get_by_role("button", name="Print this result").click()
    page.emulate_media(media="print")
    for seen in ("#photograph", ".grade", "[data-slot=referral]", "#about-rows"):
        expect(page.locator(seen)).to_be_visible()
    for control in ("#drop", "#gallery", "#print", "#heat-show", "[data-language=en]"):
        expect(page.locator(control)).to_be_hidden()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everyone_can_use_it(visit, tmp_path, viewport):
    page = visit(viewport=viewport, bypass_csp=True)  # for axe, which is put into the page
    answers = [graded_as(2, 2.31, refer=True, refer_reasons=["blurred"]), graded_as(1, 0.9)]
    page.route(
        "**/v1/grade", lambda route: changed(**answers.pop(0))(route) if answers else route.continue_()
    )
    for name in ("a.jpg", "b.jpg"):
        choose(page, photograph(jpeg(3), name))
    choose(page, photograph(b"no photograph", "note.txt"))
    axe = Axe()
    for name in in_both_languages_and_schemes(page):
        check(axe, page, tmp_path / f"{name}-failed.png")
        page.locator(".tile").first.click()
        page.locator("#heat-show").check()
        page.locator("#compare-two").click()
        expect(page.locator("#heat")).to_be_visible()
        check(axe, page, tmp_path / f"{name}.png")
        page.locator("#compare-close").click()
        page.locator(".tile").last.click()
    page.locator("#camera-open").click()
    expect(page.locator("#shutter")).to_be_enabled()
    check(axe, page, tmp_path / "camera.png")


def in_both_languages_and_schemes(page: Page) -> Iterator[str]:
    """Show the page in English and light, then in Korean and dark: texts and colors depend on one of both."""
    for language, scheme in (("English", "light"), ("한국어", "dark")):
        page.get_by_role("button", name=language).click()
        page.emulate_media(color_scheme=scheme)
        yield f"{language}-{scheme}"


def check(axe: Axe, page: Page, picture: object) -> None:
    """Check what axe finds, and that the page fits its window; write a picture of a page that fails."""
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    # Without lists of what passes, which take time in the page.
    found = axe.run(page, options={"runOnly": rules, "resultTypes": ["violations"]})
    if found.response["violations"] or scrolls_sideways(page):
        page.screenshot(path=picture, full_page=True)
    assert found.response["violations"] == [], found.generate_report()
    assert not scrolls_sideways(page)
