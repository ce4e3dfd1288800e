"""Placement groups of dead actors are removed, and no others."""

import time

import pytest
import ray
from ray.util import placement_group, placement_group_table

from cluster.reservations import remove_orphaned_placement_groups


@ray.remote(num_cpus=0)
class Maker:
    def reserve(self):
        self.group = placement_group([{"CPU": 0.1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


def states(*groups: str) -> list[str]:
    return [placement_group_table()[each]["state"] for each in groups]


@pytest.mark.usefixtures("cluster")
def test_only_those_whose_maker_is_dead_are_removed():
    own_group = placement_group([{"CPU": 0.1}])
    ray.get(own_group.ready())
    living, dead = Maker.remote(), Maker.remote()
    groups = [own_group.id.hex(), *ray.get([living.reserve.remote(), dead.reserve.remote()])]
    remove_orphaned_placement_groups()
    assert states(*groups) == ["CREATED"] * 3
    ray.kill(dead)
    deadline = time.monotonic() + 20
    while states(*groups)[-1] != "REMOVED" and time.monotonic() < deadline:
        remove_orphaned_placement_groups()
        time.sleep(0.1)
    assert states(*groups) == ["CREATED", "CREATED", "REMOVED"]
    ray.util.remove_placement_group(own_group)
    ray.kill(living)
    while states(groups[1]) != ["REMOVED"] and time.monotonic() < deadline:
        remove_orphaned_placement_groups()
        time.sleep(0.1)
