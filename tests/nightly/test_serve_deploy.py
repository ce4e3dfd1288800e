"""`serving/config.yaml` as `serve deploy` takes it: a real Ray, the command itself, real HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from scalp_core.bundles.registry import ENVIRONMENT, Registry
from serving import app
from tests.support.images import jpeg
from tests.support.ports import free_port

CONFIG = Path(app.__file__).with_name("config.yaml")
# A Ray that is started here takes this token; `serve` sends it only in this mode.
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "d" * 40}
RAY = """
import sys
from ray._private.worker import global_worker
from cluster import ray_internals
from cluster.local import connect
ray_internals._DASHBOARD_MODULES = "--modules-to-load=ServeHead"  # which `serve deploy` asks
connect(jobs=True)
print(global_worker.node.address_info["webui_url"], flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def models(bundle, make_bundle, tmp_path_factory):
    """Two versions of the model that the file names, the first one promoted."""
    registry = Registry(str(tmp_path_factory.mktemp("models")))
    for each in (bundle, make_bundle(tmp_path_factory.mktemp("second"), seed=8)):
        registry.add(str(each), "scalp")
    registry.promote("scalp", 1)
    return registry


@pytest.fixture(scope="module")
def dashboard(models):
    environment = os.environ | WITH_TOKEN | {"RAY_ADDRESS": "", ENVIRONMENT: models.root}
    with subprocess.Popen(
        [sys.executable, "-c", RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as ray:
        yield f"http://{ray.stdout.readline().strip()}"
        ray.communicate("\n", timeout=60)


def deploy(config: dict, dashboard: str, file: Path) -> None:
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", str(file), "-a", dashboard]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | WITH_TOKEN)
    assert done.returncode == 0, done.stderr


def wait_for(client: httpx.Client, version: str) -> None:
    deadline, seen = time.monotonic() + 120, ""
    while time.monotonic() < deadline:
        try:
            seen = client.get("/v1/model").text
            if version in seen:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(seen)


def test_the_file_is_deployed_and_another_version_takes_over_in_place(models, dashboard, tmp_path):
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = port = free_port()  # that of the file may be taken
    versions = [models.spec("scalp", number).model_version for number in (1, 2)]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        deploy(config, dashboard, tmp_path / "config.yaml")
        wait_for(client, versions[0])
        answer = client.post("/v1/grade", files={"file": ("a.jpg", jpeg(0))})
        assert answer.json()["model_version"] == versions[0]
        (grader,) = config["applications"][0]["deployments"]
        grader["user_config"]["bundle"] = "models://scalp@2"
        deploy(config, dashboard, tmp_path / "config.yaml")
        wait_for(client, versions[1])
        answer = client.post("/v1/grade", files={"file": ("a.jpg", jpeg(0))})
        assert answer.json()["model_version"] == versions[1]
