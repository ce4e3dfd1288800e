"""`scalp doctor` checks what the commands need, and names the fix of what is missing."""

from __future__ import annotations

import re
import socket

import pytest

from tests.support.command import run_scalp


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))


def test_a_machine_that_can_run_scalp_passes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = run_scalp("doctor", str(tmp_path), "--port", port)
    assert done.returncode == 0, done.stdout
    checks = "Python packages machine GPU Ray disk HAProxy port models S3 storage"
    for name in checks.split():
        assert f"ok      {name} " in done.stdout


def test_each_failed_check_names_the_problem_and_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.doctor.metadata.requires", lambda _: ["timm>=99", "no-such-package", "typer"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_scalp("doctor", tmp_path / "missing", "--port", port)
    assert (done.returncode, done.stderr) == (1, "")
    failed = done.stdout[done.stdout.index("FAILED") :].splitlines()
    assert "timm" in failed[0] and "no-such-package is missing" in failed[0] and "typer" not in failed[0]
    assert failed[1].endswith("hint: install the exact set of requirements.lock")
    assert f"port {port} of 127.0.0.1 is in use" in done.stdout
    assert f"cannot read {tmp_path}/missing: it does not exist" in done.stdout


def test_a_cluster_that_does_not_answer_is_a_failed_check(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    done = run_scalp("doctor")
    assert done.returncode == 1
    assert "FAILED  Ray       cannot reach the cluster at RAY_ADDRESS=127.0.0.1:9" in done.stdout


def test_a_python_that_scalp_does_not_support_is_a_failed_check(monkeypatch):
    monkeypatch.setattr("jobs.doctor.metadata.metadata", lambda _: {"Requires-Python": ">=3.99"})
    done = run_scalp("doctor")
    assert done.returncode == 1
    assert re.search(r"FAILED  Python    Python 3\.\d+\.\d+ is not >=3.99\n +hint: make the", done.stdout)


@pytest.mark.parametrize(
    ("variable", "value", "problem", "fix"),
    [
        ("AWS_PROFILE", "nope", "nope", "check AWS_PROFILE"),
        ("AWS_CONFIG_FILE", "BROKEN", "config", "check AWS_PROFILE and ~/.aws"),
        (
            "AWS_ENDPOINT_URL",
            "127.0.0.1:9000",
            "127.0.0.1:9000 of AWS_ENDPOINT_URL",
            "write http://HOST:PORT",
        ),
    ],
)
def test_a_broken_setting_of_s3_is_a_failed_check_with_its_fix(
    monkeypatch, tmp_path, variable, value, problem, fix
):
    broken = tmp_path / "config"
    broken.write_text("[default\n")
    monkeypatch.setenv(variable, str(broken) if value == "BROKEN" else value)
    done = run_scalp("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("FAILED  S3 "))
    assert problem in lines[at] and fix in lines[at + 1]
