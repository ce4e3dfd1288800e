"""Resources of a cluster or of one machine, for plans; imports no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Logical CPUs per node left to the tasks that load data.
_KEPT_FOR_DATA = 2


class ClusterError(Exception):
    """Ray is unavailable; the message is one line with the fix."""


@dataclass(frozen=True)
class Cluster:
    """Resources of the connected Ray at this moment.

    Args:
        cpus: Logical CPUs of all nodes; so for `gpus`.
        nodes: Number of nodes with CPUs.
        cores_per_node: Cores of one node.
        grows: Whether an autoscaler may start more nodes.
    """

    cpus: int
    gpus: int
    nodes: int
    cores_per_node: int
    grows: bool = False

    @property
    def cores(self) -> int:
        """Cores of all nodes."""
        return self.cores_per_node * self.nodes

    @property
    def model_cpus(self) -> int:
        """CPUs for one model actor that leave CPUs for loading and decoding on its node."""
        return max(1, min(self.cores_per_node, self.cpus // self.nodes - _KEPT_FOR_DATA))

    def models_per_node(self, cpus: int) -> int:
        """Number of model actors with `cpus` CPUs per node, next to loading and decoding."""
        on_a_node = self.cpus // self.nodes
        left = on_a_node - min(_KEPT_FOR_DATA, on_a_node - 1)
        return min(self.cores_per_node, left) // cpus


def is_joined() -> bool:
    """Whether `RAY_ADDRESS` names a running cluster to join."""
    return bool(os.environ.get("RAY_ADDRESS"))
