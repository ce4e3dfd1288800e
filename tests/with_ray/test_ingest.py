"""Training's batches through Ray Data and threads: with images in memory, and decoded again in each epoch."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.train.ingest import cache_images, training_batches, validation_batches
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.sampler import EpochSettings, RankBatch
from tests.support.training_images import ROWS, write_rows

SETTINGS = EpochSettings("dihedral", "natural", 0.2, 16, 3, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_images_that_do_not_fit_give_the_batches_of_cached_ones(cluster, tmp_path, rank):
    rows = write_rows(tmp_path)
    spec = Preprocess(size=32)
    again, nothing = cache_images(rows, spec, 0)
    cached, dataset = cache_images(rows, spec, 1 << 30)
    here, here_again = (cache_images(rows, spec, budget, in_ray=False)[0] for budget in (1 << 30, 0))
    assert (again.blocks, here_again.blocks, nothing) == (None, None, None)
    assert len(cached.blocks) == len(here.blocks) == 2 and dataset is not None
    rank_batch = RankBatch(rank, 2, SETTINGS.batch_size)
    for batches, count in (
        (lambda source: training_batches(source, SETTINGS, rank_batch, 2), 2 * ROWS // 2),
        (lambda source: validation_batches(source, rank_batch), ROWS // 2),
    ):
        expected = list(batches(cached))
        assert sum(len(batch["label"]) for batch in expected) == count
        for source in (again, here, here_again):
            for batch, other in zip(batches(source), expected, strict=True):
                assert batch.keys() == other.keys() == {"image", "label"}
                for name, values in batch.items():
                    assert values.dtype == other[name].dtype
                    np.testing.assert_array_equal(values, other[name])
