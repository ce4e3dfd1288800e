"""Files, modules and names that the pages mention exist in this repository."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scalp_core", "jobs", "serving", "cluster", "tests")
# CHANGELOG.md also names what is gone.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = (*(f"{name}/" for name in PACKAGES), "docs/", ".github/", ".devcontainer/")


@cache
def python_files() -> list[str]:
    return [
        f"/{path.relative_to(ROOT).as_posix()}" for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    ]


def has_name(dotted: str) -> bool:
    """Whether `package.module[.Name]` is a module, or a name that occurs in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                return all(re.search(rf"\b{re.escape(name)}\b", text) for name in parts[end:])
    return False


def problem(token: str) -> str | None:
    """Why a piece of inline code leads nowhere; None where it exists or is not a name of this repository."""
    name = token.split("::")[0].split(":")[0].rstrip("/()")  # FILE::test, FILE:LINE, call()
    if re.search(r"[\s*<>…{}$]", name):
        return None
    if token.startswith(FOLDERS):
        return None if (ROOT / name).exists() else "no such file or folder"
    if re.search(r"\.(?:json|ya?ml|md)$", name):  # a file of an output directory
        return None
    if re.fullmatch(r"[\w/]+\.py", name):
        return None if any(file.endswith(f"/{name}") for file in python_files()) else "no such module"
    if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", name):
        return None if has_name(name) else "no such module or name"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    in_commands = re.findall(rf"(?<![\w./:-])(?:{'|'.join(FOLDERS)})[\w./-]+\w", text)
    problems = {token: reason for token in sorted({*inline, *in_commands}) if (reason := problem(token))}
    assert problems == {}


@pytest.mark.parametrize(
    ("token", "leads_somewhere"),
    [
        ("scalp_core/images/codecs.py", True),
        ("scalp_core/codecs.py", False),
        ("codecs.py", True),
        ("tests/unit/", False),
        ("serving.settings.Settings", True),
        ("serving.rates.Buckets", False),
        ("scalp_core/", True),
    ],
)
def test_names_of_the_old_layout_are_detected(token, leads_somewhere):
    assert (problem(token) is None) == leads_somewhere
