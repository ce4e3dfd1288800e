"""docs/benchmarks.md says what the kept results say, all of it, of the newest of each."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = re.split(r"^## ", (DOCS / "benchmarks.md").read_text(), flags=re.MULTILINE)


def kept(path):
    return json.loads(path.read_text()).get("ratios")


def shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}"


def newest():
    """By bench and machine, the last file of those that hold ratios."""
    found = {}
    for path in sorted((DOCS / "results").glob("*.json")):
        kind, machine = re.fullmatch(r"(.+)-\d{4}-\d\d-\d\d-(.+)", path.stem).groups()
        if kept(path):
            found[kind, machine] = path
    return found.values()


@pytest.mark.parametrize("path", newest(), ids=lambda path: path.stem)
def test_the_page_has_every_ratio_of_a_kept_result(path):
    sections = [section for section in SECTIONS if f"(results/{path.name})" in section]
    assert len(sections) == 1, f"link results/{path.name} once, above the table of its ratios"
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", sections[0], re.MULTILINE)
    assert rows
    assert dict(rows) == {name: shown(value) for name, value in kept(path).items()}
