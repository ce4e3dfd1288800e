"""Commands of the pages that mark them are run as they stand, in their order, in an empty folder, by a shell.

A mark is an HTML comment before a code block: `<!-- run -->` for commands, `<!-- run until READY -->`
for one that goes on beside those that follow, `<!-- prints -->` for what the commands before it print.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import pages

DOCS = Path(__file__).parents[2] / "docs"
KINDS = ("run", "run until READY", "prints")


def marked(page):
    """Blocks with a mark."""
    return [(block.mark, block.text) for block in pages.blocks(page.read_text()) if block.mark in KINDS]


PAGES = [page for page in sorted(DOCS.glob("*.md")) if marked(page)]
LONGEST_S = 400  # of one block, on a machine that runs other tests besides


def names(printed):
    """What stands on the left of a table that a page shows, or the names in its JSON; values differ."""
    for line in printed.splitlines():
        keys = re.findall(r'"(\w+)":', line)
        yield from keys or [re.split(r"  +", line.strip())[0]]


class Shell:
    """Runs blocks as who types them would, `scalp` being this one; what was left running ends with it."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "COLUMNS": "200"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.left = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.left:
            process.kill()

    def run(self, commands):
        done = subprocess.run(
            ["bash", "-e", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def leave(self, command, word):
        log = self.folder / f"left-{len(self.left)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=file,
            )
        self.left.append(process)
        until = time.monotonic() + LONGEST_S
        while word not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, f"{command}\n{log.read_text()}"
            time.sleep(0.2)
        return log.read_text()

    def end(self):
        """Asks all that was left to stop, as Ctrl-C does where there is a terminal; their exit codes."""
        for process in self.left:
            process.terminate()
        return [process.wait(60) for process in self.left]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_it_says(page, tmp_path):
    printed = ""
    with Shell(tmp_path) as shell:
        for kind, block in marked(page):
            text = block.strip()
            if kind == "run":
                printed = shell.run(text)
                if "curl " in text:
                    answer = json.loads(printed)
                    assert answer["status"] == "graded" and answer["grade"] in range(4), answer
            elif kind == "prints":
                missing = [name for name in names(text) if name not in printed]
                assert not missing, f"{page.name} shows {missing}, which is not in\n{printed}"
            else:
                printed = shell.leave(text, kind.split()[-1])
        assert shell.end() == [0] * len(shell.left)


def test_the_quick_start_runs_every_verb_of_the_way():
    run = "".join(block for kind, block in marked(DOCS / "quickstart.md") if kind != "prints")
    for verb in ("synth", "prepare", "train", "evaluate", "grade", "results", "explain", "serve"):
        assert re.search(rf"^scalp {verb} ", run, re.MULTILINE)
    assert re.search("^curl ", run, re.MULTILINE)
