"""Answers of one evaluation come from one device, precision, runtime and set of versions, on any cluster."""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.resources import Cluster
from jobs.common.inference import ModelOptions, resolve, with_logits
from jobs.common.local_executor import LocalExecutor
from scalp_core.errors import UserError
from scalp_core.inference import predictor
from tests.scalp_core.inference.test_gradcam import random_bundle
from tests.support.images import jpeg
from tests.support.sizes import SMALL

TWO_NODES = Cluster(cpus=4, gpus=0, nodes=2, cores_per_node=1)


class OtherNode(LocalExecutor):
    """Calls `arrive` before the model starts, as on another node."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        super().__init__()
        self._arrive = arrive

    def pipeline(self, *arguments: Any) -> Iterator[Any]:
        self._arrive()
        yield from super().pipeline(*arguments)


@pytest.fixture
def evaluated(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(3))
    bundle = random_bundle("test_resnet", SMALL)

    def run(arrive: Callable[[], None], **options: Any) -> tuple[np.ndarray, Any]:
        model = ModelOptions(batch_size=1, **options)
        executor = OtherNode(arrive)
        computation = resolve(model, TWO_NODES, 1, executor)
        rows = pa.table({"uri": [str(tmp_path / "a.jpg")], "member": pa.nulls(1, pa.string())})
        (batch,) = with_logits(rows, bundle, computation, model, TWO_NODES, executor)
        return batch["logits"], computation

    return run


@pytest.mark.medium
def test_all_nodes_compute_in_the_precision_that_was_resolved_first(evaluated, monkeypatch):
    monkeypatch.setattr(predictor, "has_bf16", lambda _: False)
    logits, computation = evaluated(lambda: monkeypatch.setattr(predictor, "has_bf16", lambda _: True))
    expected, _ = evaluated(lambda: None, device="cpu", precision="fp32", runtime="openvino")
    np.testing.assert_array_equal(logits, expected)
    version = metadata.version
    assert (computation.device, computation.precision, computation.runtime) == ("cpu", "fp32", "openvino")
    assert computation.computed_by == f"cpu fp32 openvino {version('openvino')}, scalp {version('scalp')}"


def test_a_node_with_other_precision_or_versions_is_refused(evaluated, monkeypatch):
    monkeypatch.setattr(predictor, "has_bf16", lambda _: True)
    with pytest.raises(UserError, match="cannot compute as this run does: its CPU has no bf16"):
        evaluated(lambda: monkeypatch.setattr(predictor, "has_bf16", lambda _: False))
    version = metadata.version

    def other_version() -> None:
        monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "openvino" else version(name))

    with pytest.raises(UserError, match="it has openvino 9.9, not"):
        evaluated(other_version, precision="fp32")


def test_a_gpu_that_no_node_has_is_refused_where_only_the_driver_has_one(monkeypatch):
    monkeypatch.setattr(predictor, "_cuda_devices", lambda: 1)
    with pytest.raises(UserError, match="no node of the cluster has a GPU"):
        resolve(ModelOptions(device="cuda"), TWO_NODES, 1, LocalExecutor())
