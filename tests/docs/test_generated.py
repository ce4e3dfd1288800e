"""References and pictures in docs/ are made from the present code and results."""

from __future__ import annotations

import json
import re

import pytest

from jobs.environment import VARIABLES
from scalp_core.errors import IMAGE_CODES, IMAGE_FIXES
from serving.http.problems import CODES
from tests.docs import pictures, site_hooks
from tests.docs.references import PAGES, ROOT

_PACKAGES = ("cluster", "jobs", "scalp_core", "serving")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_reference_is_generated_from_the_present_code(path):
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run: make docs"


def test_the_reference_of_commands_has_no_hidden_command():
    page = next(text() for path, text in PAGES.items() if path.name == "commands.md")
    assert "## `scalp grade`" in page
    assert "quantise" not in page and "scalp export" not in page


@pytest.mark.parametrize("path", list(PAGES)[:-1], ids=lambda path: path.name)  # the last is partly written
def test_every_entry_of_a_reference_has_a_text(path):
    assert [line for line in PAGES[path]().splitlines() if line.endswith("|  |")] == []


def _sources(*packages: str) -> str:
    return "\n".join(path.read_text() for name in packages for path in (ROOT / name).rglob("*.py"))


def test_every_problem_code_of_the_endpoint_has_its_statuses_and_a_meaning():
    text = _sources("serving") + (ROOT / "cluster/haproxy.py").read_text()
    used = re.findall(r"(?:Refusal|problem|__init__)\(\s*(\d{3}),\s*\"(\w+)\"", text)
    used += re.findall(r"^    (\d{3}): \(\"[A-Z][\w ]+\", \"(\w+)\"", text, re.MULTILINE)  # of HAProxy
    used += re.findall(r"^    (\d{3}): \(\"(\w+)\"", text, re.MULTILINE)  # of the router
    assert len(used) > 30
    wrong = {(status, code) for status, code in used if int(status) not in CODES[code].statuses}
    assert wrong == set()
    assert [code for code in CODES if text.count(f'"{code}"') < 2] == []  # one is the registry's


def test_every_code_of_an_image_has_an_action():
    assert list(IMAGE_CODES) == list(IMAGE_FIXES)


def test_every_environment_variable_that_the_code_reads_is_listed():
    listed = {name for names in VARIABLES.values() for name in names}
    text = _sources(*_PACKAGES)
    read = set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"(?!\] = )", text))
    read |= set(re.findall(r"\"(SCALP_\w+)\"", text))
    assert read - listed <= {"PATH"}
    assert [name for name in listed if text.count(f'"{name}"') < 2 and name.startswith("SCALP_")] == []


@pytest.mark.parametrize("name", pictures.charts())
def test_a_chart_draws_the_newest_kept_result(name, tmp_path):
    kind, path = pictures.charts()[name]
    pictures.draw(name, kind, path, tmp_path)
    assert (tmp_path / name).read_bytes() == (pictures.IMAGES / name).read_bytes(), "run: make docs"


@pytest.mark.parametrize("name", pictures.PAGES)
def test_the_picture_of_a_page_shows_the_present_page(name):
    sources = json.loads(pictures.SOURCES.read_text())
    assert sources[name] == pictures.hash_sources(*pictures.PAGES[name]), "run: make pictures"


@pytest.mark.parametrize("name", site_hooks.diagrams_of_pages())
def test_the_picture_of_a_diagram_shows_the_present_source(name):
    source = site_hooks.diagrams_of_pages()[name]
    assert json.loads(pictures.SOURCES.read_text())[name] == pictures.hash_diagram(source), (
        "run: make pictures"
    )
    assert (pictures.IMAGES / name).is_file() and site_hooks.title(source)


def test_every_picture_is_small_and_shown_on_a_page():
    text = "".join(path.read_text() for path in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")])
    drawn = [path for path in pictures.IMAGES.iterdir() if path != pictures.SOURCES]
    assert [path.name for path in drawn if path.stat().st_size > pictures.MAX_BYTES] == []
    diagrams = site_hooks.diagrams_of_pages()
    assert [path.name for path in drawn if path.name not in diagrams and path.name not in text] == []
