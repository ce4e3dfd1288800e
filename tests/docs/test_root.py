"""Workflows, hooks and the development container parse, and call targets and tools that exist."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.y*ml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def test_a_job_runs_each_tier():
    assert {name for path in WORKFLOWS for name in jobs(path)} == {
        "lint",
        "fast",
        "test",
        "browser",
        "nightly",
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_targets_and_pinned_actions(path):
    commands = "\n".join(step["run"] for step in steps(path) if "run" in step)
    called = {target for words in re.findall(r"\bmake ([a-z ]+)", commands) for target in words.split()}
    assert called and called <= TARGETS
    for folder in re.findall(r"\btests/\w+", commands):
        assert (ROOT / folder).is_dir(), folder
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", step["uses"]), step["uses"]
    assert all("timeout-minutes" in job and job["runs-on"] == "ubuntu-latest" for job in jobs(path).values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_the_oldest_python_of_the_project(path):
    (oldest,) = re.findall(r">=(\d\.\d+)", PROJECT["project"]["requires-python"])
    for job in jobs(path).values():
        versions = [
            step["with"]["python-version"]
            for step in job["steps"]
            if "python-version" in step.get("with", {})
        ]
        image = job.get("container", {}).get("image", "")
        assert versions == [oldest] or image.startswith(f"python:{oldest}-")


def test_hooks_run_tools_of_the_lock_and_nothing_remote():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (repository,) = yaml.safe_load(text)["repos"]
    assert repository["repo"] == "local" and "://" not in text
    tools = {"ruff": "ruff", "lint-imports": "import-linter"}
    development = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    for hook in repository["hooks"]:
        program, *arguments = hook["entry"].split()
        if program == "make":
            assert set(arguments) <= TARGETS
        else:
            folder, tool = program.rsplit("/", 1)
            assert folder == ".venv/bin" and tools[tool] in development
        re.compile(hook.get("files", ""))


def test_the_development_container_is_set_up_by_make():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    program, target = container["postCreateCommand"].split()
    assert program == "make" and target in TARGETS
    assert container["image"].startswith("python:3.11-")
