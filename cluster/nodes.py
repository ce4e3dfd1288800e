"""Asks every node of the connected Ray something, before long work is begun on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.local import ClusterError

T = TypeVar("T")
_ANSWER_SECONDS = 15.0
# Of a large cluster these stand for all: they are started from the same image.
_MOST_NODES = 16


def run_on_each_node(question: Callable[..., T], *arguments: object) -> dict[str, T]:
    """What a process answers on each node, by the node's address; of sixteen where there are more.

    Raises:
        ClusterError: a node cannot start a process, or does not in 15 seconds.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(question)
    nodes = [node for node in ray.nodes() if node["Alive"]][:_MOST_NODES]
    asked = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in nodes
    }
    answers = {}
    for address, answer in asked.items():
        try:
            answers[address] = ray.get(answer, timeout=_ANSWER_SECONDS)
        except (RayError, TimeoutError) as error:
            first = str(getattr(error, "cause", None) or error).strip().splitlines()[0]
            raise ClusterError(
                f"node {address} cannot run a task of this project ({first}); "
                "check that its image has the project and its lock file installed"
            ) from error
    return answers
