"""The commands of the tutorials are run as they stand, in order, in one folder, by a shell.

The other tutorials continue the quick start. `tests/support/tutorials.py` describes the marks of the pages.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tutorials import run_page

DOCS = Path(__file__).parents[2] / "docs"
QUICK_START = DOCS / "quickstart.md"
TUTORIALS = sorted(DOCS.glob("tutorial-*.md"))


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the quick start."""
    folder = tmp_path_factory.mktemp("quick-start")
    run_page(QUICK_START, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_the_quick_start_do_what_it_says(quick_start):
    assert (quick_start / "runs/first/bundle/bundle.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_commands_of_a_tutorial_do_what_it_says(page, quick_start, tmp_path):
    folder = shutil.copytree(quick_start, tmp_path / "copy")
    run_page(page, folder)
