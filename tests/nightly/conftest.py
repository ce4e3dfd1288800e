"""Fixtures of the nightly tests."""

from __future__ import annotations

import pytest

from cluster.resources import Cluster
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE
from tests.support.pipeline import PipelineRun, shared_run


@pytest.fixture(scope="session")
def pipeline(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """The pipeline with the architecture of the recipe, whose epochs are long enough to be disturbed."""
    return shared_run(tmp_path_factory, [f"architecture={DEFAULT_ARCHITECTURE}"], 2)
