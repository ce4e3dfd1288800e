from importlib import metadata
from pathlib import Path

import yaml
from ray._private.authentication.authentication_token_setup import _get_default_token_path
from ray.autoscaler._private.util import prepare_config, validate_config

from scalp_core.registry import ENVIRONMENT as MODELS
from tests.unit.test_container import ENVIRONMENT

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ray_cluster.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
TYPES = CONFIG["available_node_types"]
OPTIONS = dict(each.removeprefix("-e ").split("=", 1) for each in CONFIG["docker"]["run_options"])


def test_ray_itself_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_the_head_holds_no_work_and_the_image_has_the_locked_ray():
    assert TYPES["head"]["resources"]["CPU"] == 0
    assert f":{metadata.version('ray')}-py311" in CONFIG["docker"]["image"]


def test_there_are_cpus_gpus_and_cheaper_gpus_within_bounds_and_none_when_idle():
    assert list(TYPES) == ["head", "cpu", "gpu", "gpu_spot"]
    assert [each["resources"].get("GPU", 0) for each in TYPES.values()] == [0, 0, 1, 1]
    spot = {name for name, each in TYPES.items() if "InstanceMarketOptions" in each["node_config"]}
    assert spot == {"gpu_spot"}
    for name in ("cpu", "gpu", "gpu_spot"):
        assert 0 == TYPES[name]["min_workers"] < TYPES[name]["max_workers"] <= CONFIG["max_workers"]
    assert 0 < CONFIG["idle_timeout_minutes"] <= 15


def test_the_dashboard_stays_on_loopback():
    start = next(line for line in CONFIG["head_start_ray_commands"] if line.startswith("ray start"))
    assert "--dashboard-host=127.0.0.1" in start


def test_the_token_is_a_file_that_lies_where_ray_looks_for_it():
    assert OPTIONS["RAY_AUTH_MODE"] == "token"
    where = _get_default_token_path().relative_to(Path.home())
    assert CONFIG["file_mounts"][f"/home/ray/{where}"] == f"~/{where}"
    assert "RAY_AUTH_TOKEN" not in TEXT


def test_the_nodes_have_storage_by_their_profile_and_no_key():
    assert OPTIONS[MODELS].startswith("s3://")
    assert OPTIONS["AWS_REGION"] == CONFIG["provider"]["region"]
    assert not any("KEY" in name or "SECRET" in name for name in OPTIONS)
    profiles = {name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in TYPES.items()}
    assert profiles.pop("head") not in profiles.values()  # workers may start no machines


def test_the_nodes_have_the_environment_of_the_image():
    own = {"PATH", "LD_LIBRARY_PATH", "RAY_SERVE_HAPROXY_BINARY_PATH"}
    assert {name: OPTIONS.get(name) for name in ENVIRONMENT if name not in own} == {
        name: value for name, value in ENVIRONMENT.items() if name not in own
    }
    assert Path(OPTIONS["RAY_SERVE_HAPROXY_BINARY_PATH"]).name == "scalp-haproxy"


def test_what_the_cluster_installs_exists():
    for command in CONFIG["setup_commands"]:
        for word in command.split():
            if word.startswith("/home/ray/scalp/"):
                assert (ROOT / word.removeprefix("/home/ray/scalp/")).is_file()
