"""Whoever is called at night finds a heading: for each alert, and for each failure that the tests make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ray._common.utils import get_default_ray_temp_dir
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from tests.support.metrics import ALERTS, DASHBOARDS, alerts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
SCRAPES = sorted(DASHBOARDS.glob("prometheus*.yaml"))


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_failure_that_the_tests_make_has_a_runbook():
    tests = {
        name
        for file in ROOT.glob("tests/nightly/faults/test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }
    sections = PAGE.split("\n## ")
    runbooks = {name: part for part in sections for name in re.findall(r"<!-- (test_\w+) -->", part)}
    assert set(runbooks) == tests, (
        "docs/operations.md names the tests of a runbook in a comment below its heading"
    )
    assert all("- seen: " in part and "- do: " in part for part in runbooks.values())


@pytest.mark.parametrize("path", ALERTS, ids=lambda path: path.stem)
def test_every_alert_says_what_to_do_and_where_that_is_explained(path):
    anchors = {anchor(heading) for heading in re.findall(r"^##+ (.*)$", PAGE, re.M)}
    for rule in alerts(path):
        told = rule["annotations"]
        assert told["summary"] and told["runbook"] and "\n" not in told["runbook"], rule["alert"]
        page, _, heading = told["page"].partition("#")
        assert page == "docs/operations.md" and heading in anchors, told["page"]
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("path", SCRAPES, ids=lambda path: path.stem)
def test_prometheus_loads_every_file_of_alerts_and_asks_before_ray_forgets(path):
    settings = yaml.safe_load(path.read_text())
    assert sorted(settings["rule_files"]) == [each.name for each in ALERTS]
    assert int(settings["global"]["scrape_interval"].removesuffix("s")) < 20


def test_prometheus_finds_the_nodes_where_ray_lists_them():
    (job,) = yaml.safe_load((DASHBOARDS / "prometheus.yaml").read_text())["scrape_configs"]
    (found,) = job["file_sd_configs"]
    assert found["files"] == [f"{get_default_ray_temp_dir()}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
