"""CONTRIBUTING.md: the map answers each question by an existing file, and each folder of tests is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


MAP = re.findall(r"^\| ([^|]*\*\*[^|]*) \| `([^`]+)` \|$", section("The map"), re.MULTILINE)


def test_the_map_has_ten_answers():
    rows = [line for line in section("The map").splitlines() if line.startswith("| ")][2:]
    assert len(MAP) == len(rows) >= 10
    files = [file for _, file in MAP]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(("question", "file"), MAP, ids=[file for _, file in MAP])
def test_an_answer_of_the_map_exists_and_has_the_word_of_its_question(question, file):
    assert (ROOT / file).is_file()
    (word,) = re.findall(r"\*\*(.+?)\*\*", question)
    text = (ROOT / file).read_text(encoding="utf-8").lower()
    assert word.lower() in text or re.sub(r"\W", "_", word.lower()) in file


def test_the_example_of_one_test_selects_one():
    (example,) = re.findall(r"pytest (\S+\.py) -k (\w+)", PAGE)
    file, word = example
    assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_each_folder_of_tests_is_named():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    named = set(re.findall(r"`tests/(\w+)/`", section("Where a test goes")))
    assert named == folders
