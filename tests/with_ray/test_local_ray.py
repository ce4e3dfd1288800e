"""A Ray that `cluster.local.connect` started: what its processes know, and what dies in it."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from cluster.local import connect
from cluster.resources import ClusterError
from tests.support import processes

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote(num_cpus=0)
def known() -> str | None:
    return os.environ.get("RAY_ADDRESS")


def test_its_processes_find_their_own_ray_and_the_driver_s_environment_is_as_it_was():
    before = os.environ.get("RAY_ADDRESS")
    assert ray.get(known.remote()) == ray.get_runtime_context().gcs_address
    assert os.environ.get("RAY_ADDRESS") == before


def test_it_has_no_processes_of_a_dashboard_and_an_autoscaler():
    address = ray.get_runtime_context().gcs_address  # the endpoint of other tests may have a Ray with both
    commands = []
    for pid in processes.tree(os.getpid()):
        with suppress(OSError):  # it has ended
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if address in command or f"port={address.rpartition(':')[2]}" in command:
                commands.append(command)
    assert any("gcs_server" in command for command in commands)
    assert not [command for command in commands if "dashboard.py" in command or "monitor.py" in command]


STARTS = """
from pathlib import Path
from cluster.local import connect
from ray._raylet import AuthenticationMode, get_authentication_mode
started = type(connect()).__name__
print(started, get_authentication_mode() == AuthenticationMode.TOKEN, list(Path.home().iterdir()))
"""


def test_a_local_ray_is_started_beside_one_that_nobody_named_with_a_token_that_is_written_nowhere(tmp_path):
    """Ray notes the last cluster of this machine, and would join it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    kept.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # a short path: Ray puts sockets below it
        noted = Path(folder, "ray", "ray_current_cluster")
        noted.parent.mkdir()
        noted.write_text("127.0.0.1:1")
        kept |= {"HOME": str(tmp_path), "RAY_TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, env=kept)
    assert done.stdout.strip() == "Cluster True []", done.stderr


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
