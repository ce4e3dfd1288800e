"""`SCALP_RAY_LOGS=1` shows the output of Ray and the workers; with a stub of `ray.init`."""

from __future__ import annotations

import os
from typing import Any

import pytest

from cluster import local, ray_internals

VARIABLE = "SCALP_RAY_LOGS"


class StubRay:
    """Stub of the module `ray` that prints as Ray's C++ core does, and records how it was started."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.log_monitor: bool | None = None
        self.core_log_level: str | None = None

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        os.write(2, b"output of the core\n")  # not through sys.stderr
        self.settings = settings
        self.log_monitor = getattr(ray_internals.parameter.RayParams, "keywords", {}).get(
            "include_log_monitor"
        )
        self.core_log_level = os.environ.get("RAY_BACKEND_LOG_LEVEL")

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]


@pytest.fixture
def ray(monkeypatch) -> StubRay:
    stub = StubRay()
    monkeypatch.setattr(local, "ray", stub)
    # These change the state of this process, which a Ray of later tests would inherit.
    monkeypatch.setattr(local, "require_token", lambda: None)
    for variable in (VARIABLE, "RAY_ADDRESS", "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.delenv(variable, raising=False)
    return stub


@pytest.mark.parametrize("value", [None, ""])
def test_output_of_a_local_ray_is_hidden(ray, monkeypatch, capfd, value):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    local.connect()
    assert capfd.readouterr().err == ""
    assert ray.settings["log_to_driver"] is False
    assert ray.log_monitor is False  # the process that forwards the output of workers
    assert ray.core_log_level == "fatal"


def test_variable_shows_the_output_of_a_local_ray_and_its_workers(ray, monkeypatch, capfd):
    monkeypatch.setenv(VARIABLE, "1")
    local.connect()
    assert capfd.readouterr().err == "output of the core\n"
    assert ray.settings["log_to_driver"] is True
    assert ray.log_monitor is True
    assert ray.core_log_level is None


@pytest.mark.parametrize("is_shown", [False, True])
def test_variable_shows_the_output_of_a_cluster_that_is_joined(ray, monkeypatch, capfd, is_shown):
    def check_reachable(_address: str) -> None:
        os.write(2, b"output of the check\n")

    monkeypatch.setattr(local, "_check_reachable", check_reachable)
    monkeypatch.setattr(local, "has_autoscaler", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    if is_shown:
        monkeypatch.setenv(VARIABLE, "1")
    local.connect()
    assert capfd.readouterr().err == ("output of the check\noutput of the core\n" if is_shown else "")
    assert (ray.settings["address"], ray.settings["log_to_driver"]) == ("10.0.0.1:6379", is_shown)


def test_hidden_stderr_is_back_after_the_start_also_if_it_fails(ray, monkeypatch, capfd):
    def fail(**_: Any) -> None:
        os.write(2, b"output of the core\n")
        raise ConnectionError("no Ray answers")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(local.ClusterError, match="no Ray answers"):
        local.connect()
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "later\n"
