"""Images that do not fit into memory are decoded again in each epoch: same order, same pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from jobs.common import images
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
    """A list that grows by an entry for each decoded image."""
    decoded: list[int] = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    return decoded


def cached(rows: pa.Table, budget: int = LARGE_ENOUGH) -> ImageSource:
    return cache_images(rows, SPEC, budget, in_ray=False)[0]


def epochs(source: ImageSource, rank: int) -> dict[str, Any]:
    """The images and labels of all epochs of one of two ranks."""
    rank_batch = RankBatch(rank, 2, SETTINGS.batch_size)
    return ingest._LoadRankBatch(source, SETTINGS, rank_batch, 1)({"id": np.arange(EPOCHS * ROWS // 2)})


@pytest.mark.promise("docs/training.md: images that do not fit are decoded again")
def test_images_that_do_not_fit_give_the_same_epochs_and_are_decoded_in_each(rows, decoded):
    source, other = cached(rows, LARGE_ENOUGH - 1), cached(rows)
    decoded.clear()
    for rank in (0, 1):
        expected = epochs(other, rank)
        assert len(decoded) == rank * EPOCHS * ROWS // 2
        loaded = epochs(source, rank)
        for name in ("image", "label"):
            np.testing.assert_array_equal(loaded[name], expected[name])
        assert len(np.unique(loaded["image"], axis=0)) > ROWS // 2 // 2  # the images differ
    assert len(decoded) == EPOCHS * ROWS  # each image in each epoch


def test_the_run_reports_whether_images_are_decoded_again(rows):
    source = cached(rows, 0)
    assert "the cache in memory, so they are decoded again in each epoch" in describe_cache(source)
    assert "decoded once into memory" in describe_cache(cached(rows))
    in_ray = dataclasses.replace(source, rows=ray.ObjectRef(bytes(28)))
    assert "each of 3 nodes, so they are decoded again in each epoch" in describe_cache(in_ray, 3)
    blocks = [ray.ObjectRef(bytes(28))]
    assert "decoded once into Ray's object store" in describe_cache(
        dataclasses.replace(in_ray, blocks=blocks)
    )


def test_the_budget_is_that_of_the_smallest_living_node(monkeypatch):
    nodes = [
        {"Alive": alive, "Resources": {"object_store_memory": float(size)}}
        for alive, size in ((True, 1000), (True, 800), (False, 10))
    ]
    monkeypatch.setattr(ingest.ray, "nodes", lambda: nodes)
    assert ingest.cache_budget() == 400
    monkeypatch.setattr(ingest, "object_store_size", lambda: 600)
    assert ingest.cache_budget(in_ray=False) == 300


def test_the_images_of_a_manifest_have_its_soft_labels(rows):
    assert cached(rows).soft_labels is None
    softs = [[0.5, 0, 0.5, 0] if row % 7 == 0 else None for row in range(ROWS)]
    softened = rows.append_column("soft_label", pa.array(softs, pa.list_(pa.float32())))
    source = cached(softened)
    expected = np.eye(NUM_GRADES)[source.labels]
    expected[::7] = [0.5, 0, 0.5, 0]
    np.testing.assert_array_equal(source.soft_labels, expected)


def test_soft_labels_follow_their_images(rows):
    source = cached(rows)
    soft = np.eye(NUM_GRADES, dtype=np.float32)[source.labels]
    loaded = epochs(dataclasses.replace(source, soft_labels=soft), 1)
    np.testing.assert_array_equal(loaded["soft_label"].argmax(axis=1), loaded["label"])
    assert "soft_label" not in epochs(source, 1)
