"""Room on a cluster that an autoscaler makes larger: asked for, waited for, or known never to come."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import ray_internals
from cluster.local import Cluster, ClusterError, connect

Bundle = dict[str, float]
# A cloud may take minutes for a node, and starting from an image of gigabytes minutes more.
_PATIENCE_S = 1800.0
_LOOK_S = 1.0
_CPUS_TO_WORK = 2
_TELL_S = 30.0
# What the autoscaler calls infeasible in the same moment as it learns of a demand may yet be mended.
_LOOKS_BEFORE_GIVING_UP = 3


def planned_device(cluster: Cluster, device: str) -> str:
    """cpu or cuda, for nodes that are not there yet.

    Raises:
        ClusterError: auto, and no node is there that would say it.
    """
    if device == "auto" and not cluster.gpus and not cluster.cpus:
        raise ClusterError(
            "--device auto: this cluster starts nodes as they are asked for, and none is there now; write "
            "--device cuda or --device cpu"
        )
    return "cuda" if device == "cuda" or (device == "auto" and cluster.gpus) else "cpu"


def wait_for_node(cluster: Cluster, tell: Callable[[str], None]) -> Cluster:
    """The cluster with a node at least, for work that takes what there is; it may have none when idle.

    Raises:
        ClusterError: as `wait_for_resources`.
    """
    if not cluster.grows or cluster.cpus >= _CPUS_TO_WORK:
        return cluster
    wait_for_resources([{"CPU": _CPUS_TO_WORK}], "a node to work on", tell)
    return connect()


def wait_for_resources(bundles: list[Bundle], what: str, tell: Callable[[str], None]) -> None:
    """Waits until the cluster has had room for all of them at once, for which nodes may have to be started.

    The demand is a placement group, which ends with this process whatever becomes of it, and is taken back
    when there is room: a demand that stays would keep nodes running that nobody uses.

    Args:
        bundles: resources by Ray's names, each on one node.
        what: it is for, as the user asked for it.
        tell: is told how it goes, now and then.

    Raises:
        ClusterError: no node that the autoscaler may start can hold it, or none came in half an hour.
    """
    group = placement_group(bundles)
    started = told = time.monotonic()
    refused = 0
    try:
        while not group.wait(_LOOK_S):
            moment = time.monotonic()
            refused = refused + 1 if _is_infeasible(group.id.hex()) else 0
            if refused >= _LOOKS_BEFORE_GIVING_UP:
                raise ClusterError(
                    f"{what}: no nodes that this cluster may start hold {_words(bundles)}; it has "
                    f"{_words([ray.cluster_resources()])} now; ask for less, or raise max_workers or the "
                    "node types"
                )
            if moment - started > _PATIENCE_S:
                raise ClusterError(
                    f"{what}: no nodes with {_words(bundles)} came in {_PATIENCE_S / 60:.0f} minutes; "
                    "ray status on the head says why (capacity, quota, a node that does not start)"
                )
            if moment - told > _TELL_S or told == started:
                told = moment
                tell(f"waiting for nodes with {_words(bundles)}, {moment - started:.0f} s so far")
    finally:
        remove_placement_group(group)


def _is_infeasible(group: str) -> bool:
    state = ray_internals.autoscaling_state(ray.get_runtime_context().gcs_address)
    return any(group in gang.details for gang in state.infeasible_gang_resource_requests)


def _words(bundles: list[Bundle]) -> str:
    """CPUs and GPUs in all."""
    found = []
    for name in ("CPU", "GPU"):
        if total := sum(bundle.get(name, 0) for bundle in bundles):
            found.append(f"{total:g} {name}s")
    return " and ".join(found) or "nothing"
