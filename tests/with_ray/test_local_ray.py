"""A Ray that `cluster.local.connect` started: what its processes know, and what dies in it."""

import os
import subprocess
import sys

import pytest
import ray

from cluster.local import connect
from cluster.resources import ClusterError

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote(num_cpus=0)
def known() -> str | None:
    return os.environ.get("RAY_ADDRESS")


def test_its_processes_find_their_own_ray_and_the_driver_s_environment_is_as_it_was():
    before = os.environ.get("RAY_ADDRESS")
    assert ray.get(known.remote()) == ray.get_runtime_context().gcs_address
    assert os.environ.get("RAY_ADDRESS") == before


STARTS = """
from pathlib import Path
from cluster.local import connect
from ray._raylet import AuthenticationMode, get_authentication_mode
connect()
print(get_authentication_mode() == AuthenticationMode.TOKEN, list(Path.home().iterdir()))
"""


def test_a_local_ray_has_a_token_that_is_written_nowhere(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    kept |= {"HOME": str(tmp_path), "RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, env=kept)
    assert done.stdout.strip() == "True []", done.stderr


@pytest.mark.parametrize("mode", ["disabled", "k8s"])
def test_an_environment_that_turns_the_token_off_is_refused(monkeypatch, mode):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is started"))
    with pytest.raises(ClusterError, match="unset RAY_AUTH_MODE"):
        connect()


class DiesOnce:
    """As a model whose process is lost while it loads."""

    def __init__(self, mark) -> None:
        if not mark.exists():
            mark.touch()
            os._exit(1)

    def __call__(self, batch: dict) -> dict:
        return batch


def test_a_process_that_dies_while_it_loads_is_started_again(tmp_path):
    rows = ray.data.range(8, override_num_blocks=1).map_batches(
        DiesOnce, fn_constructor_args=(tmp_path / "mark",), concurrency=1, num_cpus=1
    )
    assert sorted(row["id"] for row in rows.take_all()) == list(range(8))
    assert (tmp_path / "mark").exists()
