"""Run a function on each node of the connected Ray, to check the nodes before long work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.resources import ClusterError

T = TypeVar("T")
_TIMEOUT_S = 15.0
# A sample of a large cluster suffices: its nodes run the same image.
_MOST_NODES = 16


def run_on_each_node(function: Callable[..., T], *arguments: object) -> dict[str, T]:
    """Run `function` on each node, at most sixteen; return the results by the node's address.

    Raises:
        ClusterError: A node does not return a result within 15 seconds.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [node for node in ray.nodes() if node["Alive"]][:_MOST_NODES]
    results = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in nodes
    }
    values = {}
    for address, result in results.items():
        try:
            values[address] = ray.get(result, timeout=_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            first = str(getattr(error, "cause", None) or error).strip().splitlines()[0]
            raise ClusterError(
                f"node {address} cannot run a task of this project ({first}); "
                "check that its image has the project and its lock file installed"
            ) from error
    return values
