"""Run the commands of a tutorial as they stand, in order, in one folder, as a person types them.

A mark is an HTML comment before a code block. It has steps, separated by `, `:

    run                   run the block; it must succeed
    run, exits with 2     run the block; it must end with this code
    run until WORD        start the block, wait for a line with WORD, and leave it running
    run once FILE         start the block, wait for a file (a pattern), then press Ctrl-C
    Ctrl-C                before the block: end the last one that was left running
    review                after `run until`: answer all images of a review, then press Ctrl-C
    prints                the block is what the commands before it print

`python -m tests.support.tutorials PAGE FOLDER [LINE]` runs a page in FOLDER, from a line on, and prints what
the commands print.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import pages
from tests.support.reviewing import answer_all, read_grades

STEPS = re.compile(
    r"(?P<end>Ctrl-C, )?(?P<what>run|prints)"
    r"(?: until (?P<word>\S+)| once (?P<file>\S+)|, exits with (?P<code>\d))?(?P<review>, review)?"
)
LONGEST_S = 600  # of one block, on a machine that runs other tests besides


def tutorial_blocks(page: Path) -> list[pages.Block]:
    """Blocks of a page with a mark of this module."""
    return [block for block in pages.blocks(page.read_text()) if STEPS.fullmatch(block.mark)]


def names(printed: str) -> Iterator[str]:
    """What stands on the left of a table that a page shows, or the names in its JSON; values differ."""
    for line in printed.splitlines():
        keys = re.findall(r'"(\w+)":', line)
        yield from keys or [re.split(r"  +", line.strip())[0]]


def without_numbers(text: str) -> str:
    """Replace numbers and hashes of models, which depend on the machine and its speed."""
    return re.sub(r"-[0-9a-f]{12}\b|\d+", "0", text)


class Shell:
    """Runs blocks as one terminal does; a block that is left running has a terminal of its own.

    Variables that a block exports stay for later ones. `scalp` is the one of this interpreter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "COLUMNS": "200"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.left: list[subprocess.Popen[bytes]] = []
        self._logs = 0

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, commands: str, exits_with: int = 0) -> str:
        """Run commands; returns their output, with errors if these are expected."""
        exported = self.folder / ".environment"
        done = subprocess.run(
            ["bash", "-e", "-c", f"trap 'env -0 > {exported}' EXIT\n{commands}"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        assert done.returncode == exits_with, f"{commands}\n{done.stdout}\n{done.stderr}"
        pairs = (pair.partition("=") for pair in exported.read_text().split("\0") if pair)
        self.environment = {name: value for name, _, value in pairs}
        return done.stdout + (done.stderr if exits_with else "")

    def leave(self, command: str, word: str) -> str:
        """Start a command, and return its output as soon as it has `word`."""
        log = self._start(command)
        self._await(log, lambda: word in log.read_text())
        return log.read_text()

    def run_once(self, command: str, pattern: str) -> str:
        """Start a command, press Ctrl-C as soon as it has made a file, and return its output."""
        log = self._start(command)
        self._await(log, lambda: any(self.folder.glob(pattern)))
        self.press_ctrl_c(130)
        return log.read_text()

    def press_ctrl_c(self, exits_with: int = 0) -> None:
        """End the last block that was left running."""
        process = self.left[-1]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LONGEST_S) == exits_with
        self.left.pop()

    def end(self) -> list[int]:
        """Ask all that was left to stop; returns their exit codes."""
        for process in self.left:
            process.terminate()
        return [process.wait(60) for process in self.left]

    def _start(self, command: str) -> Path:
        self._logs += 1
        log = self.folder / f"left-{self._logs}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                # A terminal has SIGINT on, which background jobs of a script inherit as ignored.
                ["env", "--default-signal=INT", "bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.left.append(process)
        return log

    def _await(self, log: Path, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + LONGEST_S
        while not is_so():
            assert self.left[-1].poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)


def run_block(shell: Shell, block: pages.Block, printed: str) -> str:
    """Run a block, or compare it with what the blocks before it printed; returns what was printed last."""
    steps, text = STEPS.fullmatch(block.mark), block.text.strip()
    if steps["what"] == "prints":
        missing = [name for name in names(text) if without_numbers(name) not in without_numbers(printed)]
        assert not missing, f"line {block.line} shows {missing}, which is not in\n{printed}"
        return printed
    if steps["end"]:
        shell.press_ctrl_c()
    if steps["word"]:
        printed = shell.leave(text, steps["word"])
    elif steps["file"]:
        printed = shell.run_once(text, steps["file"])
    else:
        printed = shell.run(text, int(steps["code"] or 0))
    if steps["review"]:
        answer_all(re.search(r"READY (\S+)", printed)[1], read_grades(shell.folder))
        shell.press_ctrl_c()
    if re.search("^curl .*/v1/grade$", text, re.MULTILINE):
        answer = json.loads(printed)
        assert answer["status"] == "graded" and answer["grade"] in range(4), answer
    return printed


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page, in order; what was left running must end without an error."""
    printed = ""
    with Shell(folder) as shell:
        for block in tutorial_blocks(page):
            printed = run_block(shell, block, printed)
        assert shell.end() == [0] * len(shell.left)


def main(page: str, folder: str, first: str = "1") -> None:
    """Run a page from a line on, and print what its commands print: the output for the page."""
    with Shell(Path(folder)) as shell:
        for block in tutorial_blocks(Path(page)):
            exports = "\n".join(re.findall("^export .*", block.text, re.MULTILINE))
            is_run = block.line >= int(first)
            if is_run or exports:
                text = block.text if is_run else exports
                print(f"--- line {block.line}: {block.mark}\n{text}")
                print(run_block(shell, block._replace(text=text), text), flush=True)
        shell.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
