"""Gives back what actors that are dead had reserved."""

from __future__ import annotations

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_those_of_the_dead() -> None:
    """Removes the placement groups whose makers are dead.

    Ray keeps them until the job ends. Ray Train has a helper that removes those of a run which was killed, as
    Tune does with a trial that it stops; but the helper asks the dashboard whether the run is alive, and a
    local Ray has none (seen in Ray 2.60). Without this, a search would run out of CPUs.
    """
    accessor = state._connect_and_get_accessor()
    for data in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        by_driver = not group.creator_actor_id or ray.ActorID(group.creator_actor_id).is_nil()
        gone = group.creator_actor_dead and not by_driver
        if gone and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
