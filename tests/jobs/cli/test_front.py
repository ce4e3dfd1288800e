"""`scalp` without a command: its version, its panels and the completion of shells."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.common.errors import format_error
from tests.support.command import run_scalp


def output(*arguments: str, **environment: str) -> str:
    done = CliRunner().invoke(app, arguments, env=environment, prog_name="scalp")
    assert done.exit_code == 0, done.output
    return done.output


def test_version_is_that_of_the_package():
    assert output("--version") == f"scalp {metadata.version('scalp')}\n"


def test_help_lists_the_commands_in_the_order_of_work():
    panels = re.findall(r"─ ([A-Z][\w ]+) ─", output("--help"))
    assert panels == ["Options", "Try", "Data", "Models", "Bulk grading", "Endpoint", "Clusters and speed"]


def test_a_shell_completes_commands():
    offered = output(_SCALP_COMPLETE="complete_bash", COMP_WORDS="scalp pre", COMP_CWORD="1")
    assert offered.split() == ["prepare"]


@pytest.mark.parametrize(
    ("words", "problem", "fix"),
    [
        (("grade",), "scalp grade: missing argument 'bundle'", "see scalp grade --help"),
        (
            ("train", "a", "b", "--wokers", "3"),
            "scalp train: no such option: --wokers",
            "see scalp train --help",
        ),
        (("models", "nonsense"), "scalp models: no such command 'nonsense'", "see scalp models --help"),
        (
            ("evaluate", "a", "b", "c", "--split", "tst"),
            "'tst' is not one of 'train', 'val', 'test'",
            "see scalp",
        ),
        (
            ("serve", "b", "--store"),
            "scalp serve: option '--store' requires an argument",
            "see scalp serve --",
        ),
        (("keys", "new", "kim", "--scope"), "scalp keys new: option '--scope'", "see scalp keys new --help"),
    ],
)
def test_a_mistake_in_the_arguments_has_the_form_of_all_errors(words, problem, fix):
    done = run_scalp(*words)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and problem in error
    assert hint.startswith(f"hint:  {fix}")


@pytest.mark.parametrize(
    ("words", "problem", "fix"),
    [
        (("keys", "list", "/nope"), "cannot read keys from /nope: it does not exist", "check the path"),
        (("audit", "verify", "/nope"), "cannot read /nope: it does not exist", "check the path"),
        (
            ("serve", "b", "--settings", "/nope.yaml"),
            "cannot read /nope.yaml: it does not exist",
            "check the",
        ),
        (
            ("serve", "b", "--review", "kept"),
            "--review kept needs the directory of its label log",
            "add --review-l",
        ),
        (("serve", "b", "--review-labels", "l"), "--review-labels l has no images", "add --review GRADED"),
        (("demo", "--out", "s3://c/a"), "--out s3://c/a is not a local folder", "choose one"),
        (
            ("grade", "b", "w/photos", "S3://clinic/out"),
            "S3://clinic/out is neither",
            "write s3://clinic/out\n",
        ),
        (
            ("synth", "x", "--set", "seed=-1"),
            "--set seed=-1 is invalid",
            "seed must be greater than or equal",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_fix(monkeypatch, tmp_path, words, problem, fix):
    monkeypatch.chdir(tmp_path)
    done = run_scalp(*words)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ") and problem in error
    assert f"{hint}\n".startswith(f"hint:  {fix}")
    assert list(tmp_path.iterdir()) == []


def test_a_group_without_a_command_prints_its_help():
    done = run_scalp("models")
    assert done.returncode == 2 and "promote" in done.stdout + done.stderr
    assert "error:" not in done.stdout + done.stderr


def test_control_characters_of_a_name_are_replaced():
    assert (
        format_error("a\x1b[2Jb is not a zip; copy it\nagain")
        == "error: a?[2Jb is not a zip\nhint:  copy it?again"
    )


@pytest.mark.parametrize(
    ("words", "sources", "out"),
    [
        (("a", "b", "graded"), ["a", "b"], "graded"),
        (("a", "b", "-o", "graded"), ["a", "b"], "graded"),
        (("--out", "graded", "a"), ["a"], "graded"),
    ],
)
def test_grade_takes_its_output_last_or_by_option(monkeypatch, tmp_path, words, sources, out):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr("jobs.grade.driver.grade", lambda *given, **_: calls.append(given))
    assert run_scalp("grade", "bundle", *words, "--local").returncode == 0
    assert calls[0][1:3] == (sources, out)
