"""References and pictures in docs/ are made from the present code and results."""

from __future__ import annotations

import json

import pytest

from tests.docs import pictures
from tests.docs.references import PAGES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_reference_is_generated_from_the_present_code(path):
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run: make docs"


def test_the_reference_of_commands_has_no_hidden_command():
    page = next(text() for path, text in PAGES.items() if path.name == "commands.md")
    assert "## `scalp grade`" in page
    assert "quantise" not in page and "scalp export" not in page


@pytest.mark.parametrize("name", pictures.charts())
def test_a_chart_draws_the_newest_kept_result(name, tmp_path):
    kind, path = pictures.charts()[name]
    pictures.draw(name, kind, path, tmp_path)
    assert (tmp_path / name).read_bytes() == (pictures.IMAGES / name).read_bytes(), "run: make pictures"


def test_the_pictures_of_the_page_show_the_present_page():
    sources = json.loads(pictures.SOURCES.read_text())
    assert {sources["page-en.png"], sources["page-ko.png"]} == {pictures.hash_page()}, "run: make pictures"
