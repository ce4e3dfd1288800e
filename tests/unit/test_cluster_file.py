from importlib import metadata
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_ray_itself_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_the_head_holds_no_work_and_the_image_has_the_locked_ray():
    assert CONFIG["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert f":{metadata.version('ray')}-py311" in CONFIG["docker"]["image"]


def test_the_dashboard_stays_on_loopback():
    start = next(line for line in CONFIG["head_start_ray_commands"] if line.startswith("ray start"))
    assert "--dashboard-host=127.0.0.1" in start


def test_what_the_cluster_installs_exists():
    for command in CONFIG["setup_commands"]:
        for word in command.split():
            if word.startswith("/home/ray/scalp/"):
                assert (ROOT / word.removeprefix("/home/ray/scalp/")).is_file()
