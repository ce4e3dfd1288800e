"""docs/operations.md has a runbook for each alert, and for each failure that the nightly tests cause."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.metrics import ALERTS, DASHBOARDS, alerts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
SCRAPES = sorted(DASHBOARDS.glob("prometheus*.yaml"))


def anchor(heading: str) -> str:
    """Name of a heading in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_failure_that_the_tests_make_has_a_runbook():
    tests = {
        name
        for file in ROOT.glob("tests/nightly/faults/test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(encoding="utf-8"), re.M)
    }
    sections = PAGE.split("\n## ")
    runbooks = {name: section for section in sections for name in re.findall(r"<!-- (test_\w+) -->", section)}
    assert set(runbooks) == tests, (
        "docs/operations.md names the tests of a runbook in a comment below its heading"
    )
    assert all("- seen: " in section and "- do: " in section for section in runbooks.values())


@pytest.mark.parametrize("path", ALERTS, ids=lambda path: path.stem)
def test_every_alert_links_a_heading_of_the_page(path):
    anchors = {anchor(heading) for heading in re.findall(r"^##+ (.*)$", PAGE, re.M)}
    for rule in alerts(path):
        annotations = rule["annotations"]
        assert annotations["summary"], rule["alert"]
        assert annotations["runbook"] and "\n" not in annotations["runbook"], rule["alert"]
        page, _, heading = annotations["page"].partition("#")
        assert page == "docs/operations.md" and heading in anchors, annotations["page"]
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("path", SCRAPES, ids=lambda path: path.stem)
def test_prometheus_loads_every_file_of_alerts_and_scrapes_before_ray_forgets(path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sorted(settings["rule_files"]) == [file.name for file in ALERTS]
    assert int(settings["global"]["scrape_interval"].removesuffix("s")) < 20
