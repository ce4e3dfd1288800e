"""The pages build as a site, without a warning and without requests to other hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.references import ROOT
from tests.docs.site_hooks import PAGES
from tests.support.site import build_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder


@pytest.mark.medium
def test_each_page_is_part_of_the_site(site):
    for name in [*PAGES, *(path.name for path in (ROOT / "docs").glob("*.md"))]:
        page = site / name.replace("README.md", "index.md").replace(".md", ".html")
        assert "</html>" in page.read_text(encoding="utf-8"), name


@pytest.mark.medium
def test_no_page_loads_from_another_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not loaded, page
