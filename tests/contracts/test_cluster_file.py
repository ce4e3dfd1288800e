import copy
import re
from pathlib import Path

import pytest
import yaml
from botocore.exceptions import ClientError
from ray._private.authentication.authentication_token_setup import _get_default_token_path
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_NODE_NAME

from cluster.aws_spot import SpotWithFallback
from scalp_core.bundles.registry import ENVIRONMENT as MODELS
from tests.contracts import IMAGE
from tests.contracts.test_container import ENVIRONMENT

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ray_cluster.yaml").read_text()
CONFIG = yaml.safe_load(TEXT)
TYPES = CONFIG["available_node_types"]
OPTIONS = dict(each.removeprefix("-e ").split("=", 1) for each in CONFIG["docker"]["run_options"])


def test_ray_itself_accepts_the_cluster_file():
    validate_config(prepare_config(CONFIG))


def test_the_head_holds_no_work_and_the_nodes_install_nothing():
    assert TYPES["head"]["resources"]["CPU"] == 0
    assert CONFIG["docker"]["image"].endswith(f"/{IMAGE}")
    assert not CONFIG.get("setup_commands") and "pip " not in TEXT
    (login,) = CONFIG["initialization_commands"]
    assert CONFIG["docker"]["image"].split("/")[0] in login  # a registry that asks for a password


@pytest.mark.parametrize("name", TYPES)
def test_every_node_has_an_image_with_a_driver_a_closed_network_and_a_disk_for_the_container(name):
    node = TYPES[name]["node_config"]
    # Else Ray takes an image of 2023 without the driver of CUDA 13, and a group that opens port 22 to all.
    assert re.fullmatch(r"ami-\w{17}", node["ImageId"])
    assert node["SecurityGroupIds"] and len(node["SubnetIds"]) > 1
    assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}
    (disk,) = node["BlockDeviceMappings"]
    assert disk["Ebs"]["VolumeSize"] >= 100 and disk["Ebs"]["Encrypted"]
    assert CONFIG["provider"]["use_internal_ips"] is True


def test_cpus_and_gpus_multiply_bf16_in_hardware():
    families = {name: each["node_config"]["InstanceType"].split(".")[0] for name, each in TYPES.items()}
    assert families["cpu"] in ("m7i", "c7i", "m7a", "c7a")  # AMX or AVX-512 BF16
    assert families["gpu"] == families["gpu_spot"] == "g6"  # Ada


class Ec2:
    """Stub of AWS that starts on-demand instances, and has no spot instances."""

    def __init__(self):
        self.asked = []

    def create_instances(self, **conf):
        self.asked.append(conf)
        if "InstanceMarketOptions" in conf:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "none"}
            raise ClientError({"Error": error}, "RunInstances")
        if conf["InstanceType"] == "none":
            raise ClientError({"Error": {"Code": "Unsupported", "Message": "none"}}, "RunInstances")
        return []


@pytest.fixture
def provider():
    made = _get_node_provider(CONFIG["provider"], "x", use_cache=False)
    assert isinstance(made, SpotWithFallback)
    made.ec2_fail_fast = Ec2()
    return made


def test_nodes_are_started_on_demand_where_no_zone_has_spot(provider):
    config = copy.deepcopy(TYPES["gpu_spot"]["node_config"])
    provider.create_node(config, {TAG_RAY_NODE_NAME: "x"}, 2)
    *spot, last = provider.ec2_fail_fast.asked
    assert {each["SubnetId"] for each in spot} == set(config["SubnetIds"])
    assert all("InstanceMarketOptions" in each for each in spot)
    assert "InstanceMarketOptions" not in last and last["MaxCount"] == 2
    assert last["ImageId"] == config["ImageId"] and last["MetadataOptions"] == config["MetadataOptions"]


def test_a_node_that_cannot_be_started_on_demand_either_is_an_error(provider):
    config = copy.deepcopy(TYPES["gpu_spot"]["node_config"]) | {"InstanceType": "none"}
    with pytest.raises(NodeLaunchException) as refused:
        provider.create_node(config, {TAG_RAY_NODE_NAME: "x"}, 1)
    assert refused.value.category == "Unsupported"
    before = len(provider.ec2_fail_fast.asked)
    del config["InstanceMarketOptions"]
    with pytest.raises(NodeLaunchException):
        provider.create_node(config, {TAG_RAY_NODE_NAME: "x"}, 1)
    assert len(provider.ec2_fail_fast.asked) - before <= 6  # the attempts of Ray, once


def test_there_are_cpus_gpus_and_cheaper_gpus_within_bounds_and_none_when_idle():
    assert list(TYPES) == ["head", "cpu", "gpu", "gpu_spot"]
    assert [each["resources"].get("GPU", 0) for each in TYPES.values()] == [0, 0, 1, 1]
    spot = {name for name, each in TYPES.items() if "InstanceMarketOptions" in each["node_config"]}
    assert spot == {"gpu_spot"}
    assert TYPES["gpu_spot"]["priority"] > TYPES["gpu"].get("priority", 0)
    for name in ("cpu", "gpu", "gpu_spot"):
        assert 0 == TYPES[name]["min_workers"] < TYPES[name]["max_workers"] <= CONFIG["max_workers"]
    assert 0 < CONFIG["idle_timeout_minutes"] <= 15


def test_the_dashboard_stays_on_loopback():
    start = next(line for line in CONFIG["head_start_ray_commands"] if line.startswith("ray start"))
    assert "--dashboard-host=127.0.0.1" in start


def test_the_token_is_a_file_that_lies_where_ray_looks_for_it():
    assert OPTIONS["RAY_AUTH_MODE"] == "token"
    where = _get_default_token_path().relative_to(Path.home())
    assert CONFIG["file_mounts"][f"{ENVIRONMENT['HOME']}/{where}"] == f"~/{where}"
    assert "RAY_AUTH_TOKEN" not in TEXT


def test_the_nodes_have_storage_by_their_profile_and_no_key():
    assert OPTIONS[MODELS].startswith("s3://")
    assert OPTIONS["AWS_REGION"] == CONFIG["provider"]["region"]
    assert not any("KEY" in name or "SECRET" in name for name in OPTIONS)
    profiles = {name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in TYPES.items()}
    assert profiles.pop("head") not in profiles.values()  # workers may start no machines


def test_the_environment_of_the_image_is_written_once():
    assert not set(OPTIONS) & set(ENVIRONMENT)
