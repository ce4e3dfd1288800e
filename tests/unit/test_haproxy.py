"""What is made of the configuration that this Ray writes for HAProxy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from cluster import haproxy
from serving import connections


def write(folder: Path, host: str) -> str:
    """Has Ray write the configuration, for an endpoint that listens on `host`."""
    settings = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8000),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
    )
    HAProxyApi(cfg=settings, config_file_path=str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """Starts HAProxy as Ray does, only to check its configuration."""
    program = haproxy.environment(folder)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    command = [program, "-c", "-f", str(folder / "haproxy.cfg")]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(("host", "listens"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "*")])  # noqa: S104
def test_what_ray_leaves_open_is_closed_and_the_endpoint_listens_where_it_was_told(
    tmp_path, host, listens, monkeypatch
):
    monkeypatch.delenv(connections.VARIABLE, raising=False)
    # Where this fails, Ray may have settings of its own by now.
    theirs = write(tmp_path, host)
    assert "timeout http-request" not in theirs and "bind *:8404" in theirs and "bind :9101" in theirs
    for _ in range(2):  # a mended one stays as it is
        done = start(tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in (tmp_path / "haproxy.cfg").read_text().splitlines()]
        assert [line for line in lines if line.startswith("bind ")] == [
            "bind 127.0.0.1:9101",
            f"bind {listens}:8000",
            "bind 127.0.0.1:8404",
        ]
        for once in ("timeout http-request 15000ms", "option forwardfor"):
            assert lines.count(once) == 1
        assert f"stats socket {tmp_path}/admin.sock mode 600 level admin expose-fd listeners" in lines


def test_another_configuration_is_not_started(tmp_path):
    theirs = write(tmp_path, "127.0.0.1")
    (tmp_path / "haproxy.cfg").write_text(theirs.replace("mode 666", "mode 660"))
    done = start(tmp_path)
    assert done.returncode != 0 and "Ray's configuration of HAProxy has no" in done.stderr


def test_two_endpoints_of_one_machine_share_neither_port_nor_file(tmp_path):
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(haproxy.environment(tmp_path / name))
    shared = {name for name in made[0] if made[0][name] == made[1][name]}
    assert shared == {
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    }
