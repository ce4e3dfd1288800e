"""The clients of KServe, in a separate environment, against a real endpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.images import jpeg

LOCK = Path(__file__).parent / "kserve.lock"
CALLS = Path(__file__).parents[1] / "support" / "kserve_calls.py"
IMAGES = 3


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Interpreter of an environment with the packages of the lock."""
    uv, python = str(Path(sys.executable).parent / "uv"), tmp_path / "kserve" / "bin" / "python"
    packages = ["--require-hashes", "--no-deps", "-r", str(LOCK)]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
    return python


def test_the_clients_of_kserve_grade_as_the_endpoint_does(endpoint, python, tmp_path):
    files = [tmp_path / f"{seed}.jpg" for seed in range(IMAGES)]
    for seed, file in enumerate(files):
        file.write_bytes(jpeg(seed))
    with httpx.Client(base_url=endpoint.origin, timeout=60) as client:
        answers = [
            client.post("/v1/grade", files={"file": file.read_bytes()}).raise_for_status().json()
            for file in files
        ]
    words = [endpoint.origin, f"127.0.0.1:{endpoint.grpc_port}", *files]
    # Isolated: PYTHONPATH would bring this project's packages.
    command = [python, "-I", CALLS, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for protocol in ("rest", "grpc"):
        assert found[f"{protocol}_ready"] == [True, True, True]
        outputs = found[protocol]
        for name in ("grade", "probabilities", "refer"):
            assert outputs[name] == [answer[name] for answer in answers], (protocol, name)
        sets = [np.flatnonzero(row).tolist() for row in outputs["grade_set"]]
        assert sets == [answer["grade_set"] for answer in answers]
    # Over REST, kserve drops the version of an answer with binary data.
    assert found["grpc"]["model_version"] == answers[0]["model_version"]
