"""Make targets, commands, options and links in README and docs exist; the pages list each code and column."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import typer

from jobs.cli.main import app
from scalp_core.curation.findings import FINDINGS, REASONS
from scalp_core.datasets import manifest
from scalp_core.datasets.scan import OBJECT_CODES
from scalp_core.labels import log
from scalp_core.results.drift import Level
from scalp_core.results.query import By
from tests.benchmarks.__main__ import app as benchmarks
from tests.docs.references import PAGES as REFERENCES
from tests.support.layouts import LAYOUTS
from tests.support.pages import page_commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOT_PAGES = [ROOT / name for name in ("README.ko.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
# Without the module tables of architecture.md: docstrings name commands without their arguments.
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
WRITTEN = [page for page in PAGES[1:] if page not in REFERENCES or page.name == "benchmarks.md"]
DOCS = {page.name: GENERATED.sub("", page.read_text()) for page in WRITTEN}
COMMANDS = [
    shlex.split(command)
    for command in [
        *page_commands(README),
        *(command for text in DOCS.values() for command in re.findall(r"`(scalp [^`<]+)`", text)),
        *(command for text in DOCS.values() for command in page_commands(text)),
    ]
]
VERBS = typer.main.get_command(app).commands
BENCHMARKS = sorted(
    {
        command.split("  ")[0]
        for text in [README, *DOCS.values()]
        for command in re.findall(r"(?:^ *|`)python -m tests\.benchmarks ([^`\n]+)", text, re.MULTILINE)
    }
)


def leaves(verbs):
    """Commands without subcommands, those of groups included."""
    for verb in verbs:
        yield from leaves(verb.commands.values()) if hasattr(verb, "commands") else [verb]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_scalp_command_parses(words):
    if len(words) == 2:  # a verb that is only named
        assert words[1] in VERBS
        return
    verb, rest = VERBS[words[1]], words[2:]
    while commands := getattr(verb, "commands", None):
        verb, rest = commands[rest[0]], rest[1:]
    if rest:  # otherwise a command of a group that is only named
        verb.make_context(words[1], rest)  # raises for a missing argument or an unknown option


@pytest.mark.parametrize("command", BENCHMARKS)
def test_every_benchmark_command_parses(command):
    name, *words = command.split()
    typer.main.get_command(benchmarks).commands[name].make_context(name, words)


def test_the_korean_readme_has_the_same_commands_figures_and_pictures():
    korean = (ROOT / "README.ko.md").read_text()

    def figures(text: str) -> set[str]:
        return set(re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", text))

    assert figures(README) <= figures(korean)
    assert page_commands(README) == page_commands(korean)
    pictures = [re.findall(r"docs/images/[\w.-]+", page.replace("-ko.", "-en.")) for page in (README, korean)]
    assert pictures[0] == pictures[1]


def test_every_verb_named_in_the_text_exists():
    named = set(re.findall(r"`scalp ([a-z]+)", README)) | {words[1] for words in COMMANDS}
    assert named
    assert named <= set(VERBS)


def test_the_data_page_explains_every_column_of_the_manifest():
    assert [name for name in manifest.SCHEMA.names if f"`{name}`" not in DOCS["data.md"]] == []


def test_the_data_page_explains_every_reason_and_finding():
    archives_and_names = ("bad_archive", "nested_archive", "bad_name")
    for word in [*REASONS, *OBJECT_CODES, *archives_and_names, *FINDINGS]:
        if word not in ("bad_meta",):  # a META file drops no photograph
            assert f"`{word}`" in DOCS["data.md"], word


def test_the_review_page_explains_every_column_of_the_label_log():
    assert [name for name in log.SCHEMA.names if f"`{name}`" not in DOCS["review.md"]] == []


def test_the_ai_hub_page_lists_every_layout():
    assert [name for name in LAYOUTS if f"`{name}`" not in DOCS["aihub.md"]] == []


def test_the_grading_page_explains_every_table_and_level():
    for word in [*get_args(By), *get_args(Level)]:
        assert f"`{word}`" in DOCS["grading.md"], word


def test_the_change_log_lists_every_hidden_alias():
    hidden = {f"scalp {name}" for name, verb in VERBS.items() if verb.hidden}
    hidden |= {
        name
        for verb in leaves(VERBS.values())
        for parameter in verb.params
        if getattr(parameter, "hidden", False)
        for name in parameter.opts
    }
    deprecated = (ROOT / "CHANGELOG.md").read_text().split("### Deprecated")[1].split("###")[0]
    assert {alias for alias in hidden if f"`{alias}`" not in deprecated} == set()


def test_every_option_named_in_the_text_exists():
    options = {"--help"} | {
        name
        for verb in leaves(VERBS.values())
        for parameter in verb.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"--[a-z][a-z-]+", README + DOCS["grading.md"]))
    assert named
    assert named <= options


def anchors(page):
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + ROOT_PAGES, ids=lambda page: page.name)
def test_every_make_target_and_link_leads_somewhere(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    present = text.split("### Removed")[0]  # of the change log: what was removed leads nowhere
    assert set(re.findall(r"(?:`|^ *)make ([a-z]+)", present, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_index_names_every_page():
    named = set(re.findall(r"^- \[[^]]+\]\(([^)]+)\): ", DOCS["README.md"], re.MULTILINE))
    assert {page.name for page in PAGES[1:]} - {"README.md"} <= named
