"""docs/benchmarks.md has each ratio of the newest kept result of each benchmark and machine."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = re.split(r"^## ", (DOCS / "benchmarks.md").read_text(), flags=re.MULTILINE)


def ratios(path):
    return json.loads(path.read_text()).get("ratios")


def format_value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}"


def newest():
    """The newest file with ratios, per benchmark and machine."""
    files = {}
    for path in sorted((DOCS / "results").glob("*.json")):
        kind, machine = re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d-(.+)", path.stem).groups()
        if ratios(path):
            files[kind, machine] = path
    return files.values()


@pytest.mark.parametrize("path", newest(), ids=lambda path: path.stem)
def test_the_page_has_every_ratio_of_a_kept_result(path):
    sections = [section for section in SECTIONS if f"(results/{path.name})" in section]
    assert len(sections) == 1, f"link results/{path.name} once, above the table of its ratios"
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", sections[0], re.MULTILINE)
    assert rows
    assert dict(rows) == {name: format_value(value) for name, value in ratios(path).items()}
