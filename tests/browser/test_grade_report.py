"""The report of a run as a browser shows it: by itself, without a scroll to the side, in light and dark."""

import re

import pytest

from jobs.grade.report import write_report
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from tests.browser.conftest import DESKTOP, PHONE
from tests.scalp_core.reports.test_grading_report import ODD, photographs, summary_of
from tests.support.result_rows import failed, write


@pytest.fixture(scope="module")
def report(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = photographs(folder / "clinic", 8)
    rows += [failed(f"/data/{ODD * 3}", "empty"), failed(f"/data/{'long' * 60}.jpg", "corrupt")]
    write(str(folder / "results"), rows)
    storage.write(f"{folder}/summary.json", b"{}")
    changes = {"photographs_per_second": 1.1}
    write_report(str(folder), summary_of(rows, **changes), load_bundle(str(bundle)), 2)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_report_is_shown_whole_and_asks_no_other(browser, report, viewport, scheme):
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text))  # what its own policy stops is told here
    page.goto(f"file://{report}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
    assert page.get_by_text("✓ all accounted for").is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    pictures = page.locator("article img")
    assert pictures.count() == 8 + 2
    assert pictures.evaluate_all("all => all.every(each => each.complete && each.naturalWidth == 64)")
    assert page.get_by_role("img", name="the image as the model saw it").count() == 6
    page.locator("a.tile", has_text="to look at").click()
    assert page.locator("#look").is_visible()
    page.get_by_label("한국어").check()
    assert page.get_by_text("✓ 모두 확인됨").is_visible()
    assert page.locator("main").inner_text().count("accounted") == 0
    assert page.get_by_role("img", name="모델이 본 이미지").count() == 6
    assert page.get_by_role("img", name=re.compile("양호 [0-9]+, 1 경증")).count() > 0  # of the bars
    assert page.get_by_role("img", name=re.compile("[A-Za-z]")).count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "scrolls sideways"
    context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
