"""`--json` prints one JSON document on standard output, and nothing else there."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

from jobs.common.console import console
from scalp_core.bundles.registry import open_registry
from serving.auth.keys import new_key
from tests.support.command import run_scalp
from tests.support.small_grade import run, sources, write_bundle


def document(*words: object, code: int = 0):
    done = run_scalp(*words, "--json")
    assert done.returncode == code, done.stderr
    assert not console.stderr  # the next command prints on standard output again
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    root = tmp_path_factory.mktemp("graded")
    run(write_bundle(f"{root}/bundle"), sources(f"{root}/data"), f"{root}/out", report=False)
    return f"{root}/out"


def test_results_are_an_overview_counts_or_rows(graded):
    overview = document("results", graded)
    assert overview["finished"] and overview["rows"] == overview["graded"] + overview["failed"]
    counts = document("results", graded, "--by", "grade")
    assert sum(row["photographs"] for row in counts) == overview["rows"]
    failed = document("results", graded, "--status", "failed")
    assert len(failed) == overview["failed"] > 0
    assert all(row["error_code"] and row["uri"] for row in failed)
    assert len(document("results", graded, "--status", "graded", "--limit", "2")) == 2
    assert document("results", graded, "--sql", "select count(*) as n from results") == [
        {"n": overview["rows"]}
    ]


def test_an_error_leaves_standard_output_empty(graded):
    done = run_scalp("results", graded, "--output", f"{graded}.csv", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --json prints the rows, and --output writes them\nhint:  ")


def test_a_plan_is_its_numbers(tmp_path):
    named = sources(f"{tmp_path}/data")
    bundle = write_bundle(f"{tmp_path}/bundle")
    plan = document("grade", bundle, *named, "--out", tmp_path / "out", "--plan", "--rate", "10")
    assert (plan["images"], plan["done"], plan["cost"]) == (8, 0, None)


def test_models_are_their_versions(tmp_path):
    registry = f"{tmp_path}/models"
    assert document("models", "list", "--registry", registry) == []
    store = open_registry(registry)
    store.add(write_bundle(f"{tmp_path}/bundle"), "scalp")
    (version,) = document("models", "list", "--registry", registry)
    assert version["model"] == "scalp@1" and version["promoted"] is None
    assert isinstance(version["validation_kappa"], float | None) and isinstance(version["warnings"], list)
    store.promote("scalp", 1)
    (version,) = document("models", "list", "--registry", registry)
    assert set(version["promoted"]) == {"at", "by", "signer"}


def test_jobs_are_their_states(monkeypatch):
    job = SimpleNamespace(id="a.1", status="RUNNING", started=None, ended=None, command="grade")
    monkeypatch.setattr("cluster.jobs_api.Jobs", lambda _: SimpleNamespace(all=lambda: [job]))
    assert document("jobs", "list") == [
        {"job": "a.1", "status": "running", "started": None, "ended": None, "command": "grade"}
    ]


def test_keys_are_without_their_secrets(tmp_path):
    key, line = new_key("clinic-7")
    (tmp_path / "keys.txt").write_text(f"{line}\n")
    (tmp_path / "keys.txt").chmod(0o600)
    (entry,) = document("keys", "list", tmp_path / "keys.txt")
    assert (entry["id"], entry["scopes"], entry["expires"]) == ("clinic-7", ["grade"], None)
    assert key not in str(entry)


def test_doctor_names_each_check(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = document("doctor", "--port", taken.getsockname()[1], code=1)
    assert not outcome["passed"]
    port = next(check for check in outcome["checks"] if check["name"] == "port")
    assert not port["passed"] and port["hint"] == "choose another one with --port"
