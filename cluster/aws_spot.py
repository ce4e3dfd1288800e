"""Node provider for AWS that falls back from spot to on-demand instances."""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException

from cluster.ray_internals import aws_node_provider

_LOG = logging.getLogger(__name__)
_AWSNodeProvider: Any = aws_node_provider()


class SpotWithFallback(_AWSNodeProvider):
    """Start a node type of spot instances on demand when no zone starts one.

    Ray's autoscaler v2 does not: a launch that AWS refuses is repeated with the same node type (Ray 2.60; its
    CloudResourceMonitor counts timeouts alone). `provider.module` of ray_cluster.yaml names this class.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if "InstanceMarketOptions" not in node_config:
                raise
            _LOG.warning("no spot instance (%s: %s); starting on demand", error.category, error.description)
            on_demand = {
                name: value for name, value in node_config.items() if name != "InstanceMarketOptions"
            }
            return super().create_node(on_demand, tags, count)
