"""`scalp doctor` checks what the commands need, and names the fix of what is missing."""

from __future__ import annotations

import socket

import pytest

from tests.support.command import run_scalp


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SCALP_MODELS", str(tmp_path / "models"))


def test_a_machine_that_can_run_scalp_passes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = run_scalp("doctor", str(tmp_path), "--port", port)
    assert done.returncode == 0, done.stdout
    for name in ("packages", "machine", "GPU", "Ray", "disk", "HAProxy", "port", "models", "S3", "storage"):
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
