"""`scalp COMMAND --help`: each command has examples that parse, each option has a description."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jobs.cli.main import app

SCALP = typer.main.get_command(app)


def find_commands(group: Any, path: str = "scalp") -> Iterator[tuple[str, Any]]:
    """Path and command of each command below `group`, without hidden aliases."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from find_commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


COMMANDS = dict(find_commands(SCALP))


def examples(command: Any) -> list[str]:
    """Example lines below the help of `command`."""
    paragraphs = (command.epilog or "").removeprefix("Examples:").removeprefix("Example: ").split("\n\n")
    return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]


@pytest.mark.parametrize("path", COMMANDS)
def test_help_ends_with_examples_that_parse(path):
    lines = examples(COMMANDS[path])
    assert lines
    assert any(line == path or line.startswith(f"{path} ") for line in lines)
    for line in lines:
        _, *words = shlex.split(line)
        group: Any = SCALP
        while hasattr(group, "commands"):
            group, words = group.commands[words[0]], words[1:]
        group.make_context(line, words)  # raises for a missing argument or an unknown option


@pytest.mark.parametrize("path", COMMANDS)
def test_each_argument_and_option_has_a_description(path):
    parameters = [parameter for parameter in COMMANDS[path].params if parameter.name != "help"]
    assert [parameter.name for parameter in parameters if not getattr(parameter, "help", None)] == []


@pytest.mark.parametrize("path", COMMANDS)
def test_help_cuts_no_word_on_a_narrow_terminal(path, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    shown = CliRunner().invoke(app, [*path.split()[1:], "--help"]).output
    written = "".join(parameter.help or "" for parameter in COMMANDS[path].params)
    assert shown.count("…") == (written + (COMMANDS[path].epilog or "")).count("…")
    assert re.findall(r"<[\w-]+\|[\w|-]*(?![\w|>-])", shown) == []  # choices that end in another line


def test_each_group_has_an_example():
    groups = {name: group for name, group in SCALP.commands.items() if hasattr(group, "commands")}
    assert groups
    assert [name for name, group in groups.items() if f"scalp {name} " not in (group.epilog or "")] == []


def test_a_flag_that_turns_something_off_shows_no_default():
    for path, command in COMMANDS.items():
        off = [parameter for parameter in command.params if getattr(parameter, "secondary_opts", None)]
        assert [
            parameter.name for parameter in off if parameter.opts == [""] and parameter.show_default
        ] == [], path


@pytest.mark.parametrize(
    "line",
    [
        "grade b s o --models 2:8 --cpus-per-model=1 --gpus-per-model 1 --fetches 4",
        "results o --only failed --under /a --to x.csv",
        "prepare s o --task=json --split 8:1:1",
        "models promote m@1 --leaky-too",
        "submit --again --no-follow --any-versions train d r",
        "serve b --open-to-network-without-keys",
    ],
)
def test_former_names_of_options_are_accepted_and_not_shown(line):
    words, group, path = line.split(), SCALP, "scalp"
    while hasattr(group, "commands"):
        path, group = f"{path} {words[0]}", group.commands[words.pop(0)]
    group.make_context(path, list(words))  # raises for an unknown option
    shown = {name for parameter in group.params for name in parameter.opts}
    assert shown.isdisjoint(word.partition("=")[0] for word in words if word.startswith("--"))


def test_a_former_name_after_two_dashes_is_a_value():
    context = SCALP.commands["grade"].make_context("scalp grade", ["b", "--", "--models", "o"])
    assert context.params["sources_and_out"] == ["--models", "o"]
