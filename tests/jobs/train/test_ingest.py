"""Images that do not fit into the object store are decoded again in each epoch: same order, same pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.data.extensions import ArrowTensorArray

from cluster.resources import Cluster
from jobs.common import images
from jobs.common.images import LoadForTraining, without_nulls
from jobs.train import ingest
from jobs.train.ingest import ImageSource, cache_images, describe_cache
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.sampler import EpochSettings, RankBatch
from tests.support.training_images import ROWS, write_rows

SPEC = Preprocess(size=32)
EPOCHS = 2
SETTINGS = EpochSettings("dihedral", "natural", 0.2, 16, EPOCHS, 3)
LARGE_ENOUGH = ROWS * SPEC.size**2 * 3


@pytest.fixture
def rows(tmp_path) -> pa.Table:
    return write_rows(tmp_path)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Replace Ray's object store by this process; the list grows by an entry for each decoded image."""
    decoded: list[int] = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    monkeypatch.setattr(ingest.ray, "put", lambda value: value)
    monkeypatch.setattr(ingest.ray, "get", lambda reference: reference)
    monkeypatch.setattr(ingest, "make_dataset", lambda *_: None)  # fails if it is used
    return decoded


def cached(rows: pa.Table) -> ImageSource:
    """The source with blocks as Ray Data makes them."""
    table = without_nulls(rows)
    blocks = []
    for start in range(0, ROWS, ingest._ROWS_PER_BLOCK):
        block = table.slice(start, ingest._ROWS_PER_BLOCK)
        columns = {name: block[name].to_numpy() for name in block.column_names}
        pixels = ArrowTensorArray.from_numpy(LoadForTraining(SPEC)(columns)["image"])
        blocks.append(pa.table({"image": pixels}))
    return ImageSource(rows["label"].to_numpy(), table, SPEC, blocks)


def epochs(source: ImageSource, rank: int) -> dict[str, Any]:
    """The images and labels of all epochs of one of two ranks."""
    rank_batch = RankBatch(rank, 2, SETTINGS.batch_size)
    return ingest._LoadRankBatch(source, SETTINGS, rank_batch, 1)({"id": np.arange(EPOCHS * ROWS // 2)})


@pytest.mark.promise("docs/training.md: images that do not fit are decoded again")
def test_images_that_do_not_fit_give_the_same_epochs_and_are_decoded_in_each(rows, decoded):
    source, _ = cache_images(rows, SPEC, LARGE_ENOUGH - 1)
    other = cached(rows)
    decoded.clear()
    for rank in (0, 1):
        expected = epochs(other, rank)
        assert len(decoded) == rank * EPOCHS * ROWS // 2
        loaded = epochs(source, rank)
        for name in ("image", "label"):
            np.testing.assert_array_equal(loaded[name], expected[name])
        assert len(np.unique(loaded["image"], axis=0)) > ROWS // 2 // 2  # the images differ
    assert len(decoded) == EPOCHS * ROWS  # each image in each epoch


def test_the_run_reports_whether_images_are_decoded_again(rows, decoded):
    cluster = Cluster(cpus=2, gpus=0, nodes=3, cores_per_node=2)
    source, _ = cache_images(rows, SPEC, 0)
    assert "3 nodes, so they are decoded again in each epoch" in describe_cache(source, cluster)
    assert "decoded once into Ray's object store" in describe_cache(cached(rows), cluster)


def test_the_budget_is_that_of_the_smallest_living_node(monkeypatch):
    nodes = [
        {"Alive": alive, "Resources": {"object_store_memory": float(size)}}
        for alive, size in ((True, 1000), (True, 800), (False, 10))
    ]
    monkeypatch.setattr(ingest.ray, "nodes", lambda: nodes)
    assert ingest.cache_budget() == 400


@pytest.mark.usefixtures("decoded")
def test_the_images_of_a_manifest_have_its_soft_labels(rows):
    assert cache_images(rows, SPEC, 0)[0].soft_labels is None
    softs = [[0.5, 0, 0.5, 0] if row % 7 == 0 else None for row in range(ROWS)]
    softened = rows.append_column("soft_label", pa.array(softs, pa.list_(pa.float32())))
    source, _ = cache_images(softened, SPEC, 0)
    expected = np.eye(NUM_GRADES)[source.labels]
    expected[::7] = [0.5, 0, 0.5, 0]
    np.testing.assert_array_equal(source.soft_labels, expected)


@pytest.mark.usefixtures("decoded")
def test_soft_labels_follow_their_images(rows):
    source = cached(rows)
    soft = np.eye(NUM_GRADES, dtype=np.float32)[source.labels]
    loaded = epochs(dataclasses.replace(source, soft_labels=soft), 1)
    np.testing.assert_array_equal(loaded["soft_label"].argmax(axis=1), loaded["label"])
    assert "soft_label" not in epochs(source, 1)
