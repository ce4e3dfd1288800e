"""docs/architecture.md agrees with the modules and with the layers that import-linter checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.module_tables import COMMAND, PACKAGES, PAGE, ROOT, modules, packages, render

MOST_MODULES = 14  # directly in one package: above it, a newcomer cannot read the list


def test_the_page_is_generated_from_the_present_code():
    text = PAGE.read_text(encoding="utf-8")
    # No assertion that compares the texts: its message would show both pages.
    if render(text) != text:
        pytest.fail(f"docs/architecture.md differs from docstrings or layers; run: {COMMAND}", pytrace=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_has_the_tables_of_each_package(package):
    assert f"<!-- generated: modules of {package} -->" in PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_layers():
    assert "<!-- generated: layers -->" in PAGE.read_text(encoding="utf-8")


def test_tables_follow_docstrings():
    page = "<!-- generated: modules of cluster -->\n| `gone.py` | a module that was deleted |\n<!-- end -->\n"
    table = render(page)
    assert "gone.py" not in table
    assert all(f"| `{module.name}` | " in table for module in modules(ROOT / "cluster"))


def test_the_modules_in_the_diagrams_exist():
    diagrams = "".join(PAGE.read_text(encoding="utf-8").split("```mermaid")[1:])
    named = set(re.findall(r"[\w/]+\.py", " ".join(re.findall(r"<b>(.*?)</b>", diagrams))))
    files = [
        f"/{path.relative_to(ROOT).as_posix()}" for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    ]
    assert named
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_more_modules_than_one_can_read(package):
    counts = {folder.relative_to(ROOT): len(modules(folder)) for folder in packages(ROOT / package)}
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_every_folder_with_modules_is_a_package():
    """A folder without `__init__.py` would be left out of tables, wheels and import contracts."""
    folders: set[Path] = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
