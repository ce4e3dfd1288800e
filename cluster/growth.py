"""Wait for nodes of a cluster with an autoscaler, or report that none can come."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import ray_internals
from cluster.local import connect
from cluster.resources import Cluster, ClusterError

Bundle = dict[str, float]
# A cloud may take minutes to start a node, and pulling an image of gigabytes takes minutes more.
_TIMEOUT_S = 1800.0
_POLL_S = 1.0
_CPUS_TO_WORK = 2
_REPORT_S = 30.0
# The autoscaler's first reports on a new demand may call it infeasible by mistake.
_INFEASIBLE_POLLS = 3


def planned_device(cluster: Cluster, device: str) -> str:
    """Resolve `device` to cpu or cuda on a cluster that may have no nodes yet.

    Raises:
        ClusterError: `device` is auto, and the cluster has no node to detect it on.
    """
    if device == "auto" and not cluster.gpus and not cluster.cpus:
        raise ClusterError(
            "--device auto: this cluster starts nodes on demand and has none now; use --device cuda or "
            "--device cpu"
        )
    return "cuda" if device == "cuda" or (device == "auto" and cluster.gpus) else "cpu"


def wait_for_node(cluster: Cluster, report: Callable[[str], None]) -> Cluster:
    """Wait until the cluster has at least one node; an autoscaler may have removed all when idle.

    Raises:
        ClusterError: as `wait_for_resources`.
    """
    if not cluster.grows or cluster.cpus >= _CPUS_TO_WORK:
        return cluster
    wait_for_resources([{"CPU": _CPUS_TO_WORK}], "a node to work on", report)
    return connect()


def wait_for_resources(bundles: list[Bundle], what: str, report: Callable[[str], None]) -> None:
    """Wait until the cluster can hold all `bundles` together; the autoscaler may start nodes for them.

    The demand is a placement group. It ends with this process, and is removed when the resources are there: a
    demand that stays would keep unused nodes running.

    Args:
        bundles: Resources by Ray's names; each bundle must fit on one node.
        what: Purpose of the resources, as the user wrote it; begins the error message.
        report: Called with a line of progress every 30 seconds.

    Raises:
        ClusterError: No node type of the autoscaler can hold a bundle, or no node came in half an hour.
    """
    group = placement_group(bundles)
    started = reported = time.monotonic()
    infeasible_polls = 0
    try:
        while not group.wait(_POLL_S):
            now = time.monotonic()
            infeasible_polls = infeasible_polls + 1 if _is_infeasible(group.id.hex()) else 0
            if infeasible_polls >= _INFEASIBLE_POLLS:
                raise ClusterError(
                    f"{what}: no nodes that this cluster may start hold {_words(bundles)}; it has "
                    f"{_words([ray.cluster_resources()])} now; ask for less, or raise max_workers or the "
                    "node types"
                )
            if now - started > _TIMEOUT_S:
                raise ClusterError(
                    f"{what}: no nodes with {_words(bundles)} came in {_TIMEOUT_S / 60:.0f} minutes; "
                    "ray status on the head says why (capacity, quota, a node that does not start)"
                )
            if now - reported > _REPORT_S or reported == started:
                reported = now
                report(f"waiting for nodes with {_words(bundles)}, {now - started:.0f} s so far")
    finally:
        remove_placement_group(group)


def _is_infeasible(group: str) -> bool:
    state = ray_internals.autoscaling_state(ray.get_runtime_context().gcs_address)
    return any(group in gang.details for gang in state.infeasible_gang_resource_requests)


def _words(bundles: list[Bundle]) -> str:
    """CPUs and GPUs of all bundles together, such as `4 CPUs and 1 GPUs`."""
    totals = []
    for name in ("CPU", "GPU"):
        if total := sum(bundle.get(name, 0) for bundle in bundles):
            totals.append(f"{total:g} {name}s")
    return " and ".join(totals) or "nothing"
