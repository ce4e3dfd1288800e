"""Frees the placement groups of dead actors."""

from __future__ import annotations

from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster import ray_internals


def remove_orphaned_placement_groups() -> None:
    """Remove the placement groups whose creating actor is dead.

    Ray keeps them until the job ends. Ray Train has a helper that removes those of a killed run, and Tune
    kills the run of a trial that it stops. But the helper asks the dashboard whether the run is alive, and a
    local Ray has none (seen in Ray 2.60). Without this function a search would run out of CPUs.
    """
    for group in ray_internals.orphaned_placement_groups():
        remove_placement_group(PlacementGroup(group))
