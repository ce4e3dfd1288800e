"""What /openapi.json says of the endpoint holds, whatever is sent: schemathesis makes the requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from cluster.local import Cluster
from serving import app
from serving.settings import Settings
from tests.conftest import free_port


@pytest.fixture(scope="module")
def described(bundle: Path, cluster: Cluster) -> Iterator[schemathesis.BaseSchema]:
    port = free_port()
    app.start(str(bundle), "127.0.0.1", port, Settings(device="cpu", precision="fp32"))
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    app.stop()


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_it_is_described(case):
    case.call_and_validate(timeout=60)
