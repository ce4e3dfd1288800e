"""An S3 server that is away for 20 seconds in the middle of `scalp prepare` costs time and nothing else."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.demo_s3 import s3_server
from scalp_core import storage
from scalp_core.datasets import manifest
from scalp_core.storage.outputs import SCRATCH_FOLDER
from tests.support.images import jpeg

pytestmark = pytest.mark.slow

OBJECTS = 1200
AWAY_S = 20


def test_a_server_that_is_away_for_20_seconds_is_waited_for(tmp_path, monkeypatch):
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        def put(index):
            storage.write(f"s3://scalp/set/{index % 4}/{index}.jpg", jpeg(index, size=(160, 120)))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(OBJECTS)))
        command = [sys.executable, "-m", "jobs.cli", "prepare", "s3://scalp/set", str(tmp_path / "out")]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        listing = tmp_path / "out" / SCRATCH_FOLDER / "listing.json"
        until = time.monotonic() + 60
        while not listing.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
    # The server is stopped, and nothing is examined yet, or not all.
    shards = json.loads(listing.read_text())["shards"]
    # A file that is being written has another suffix.
    examined = list((tmp_path / "out" / SCRATCH_FOLDER / "examined").glob("*.parquet"))
    assert len(examined) < len(shards)
    time.sleep(AWAY_S)
    assert process.poll() is None  # it waits
    with s3_server(tmp_path / "s3", again=server):
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["objects_listed"] == summary["photographs"] == OBJECTS
    assert summary["dropped"] == {}
    assert summary["could_not_be_fetched"] == 0
    table = manifest.read_manifest(str(tmp_path / "out"))
    assert len(set(table["uri"].to_pylist())) == OBJECTS
