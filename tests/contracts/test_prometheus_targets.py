"""Ray's list of nodes for Prometheus is where cluster/dashboards/prometheus.yaml reads it."""

from __future__ import annotations

import yaml
from ray._common.utils import get_default_ray_temp_dir
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from tests.support.metrics import DASHBOARDS


def test_prometheus_reads_the_file_in_which_ray_lists_its_nodes():
    (job,) = yaml.safe_load((DASHBOARDS / "prometheus.yaml").read_text(encoding="utf-8"))["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert discovery["files"] == [f"{get_default_ray_temp_dir()}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
