"""The sampler: equal for any number of workers, complete, and different in each epoch."""

from hashlib import sha256

import numpy as np
import pytest

from jobs.train.ingest import _LoadRankBatch
from scalp_core.images import augment
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import X4, EpochSettings, RankBatch, images_per_epoch, plan_epoch
from scalp_core.seeds import Purpose, seed_sequence, torch_seed

LABELS = np.repeat([0, 1, 2, 3], [3, 40, 50, 12]).astype(np.int8)
# Of rows, symmetry and color of two plans, since seeds come from `scalp_core.seeds`.
PINNED = [
    "8eb407b6be41b982", "8a7dda0be00b0bd3", "57c759d787394867",
    "5f2563e648722a99", "f6ac32469a9d0db0", "8107509e23bfeb75",
]  # fmt: skip


def plan(epoch=1, augment="dihedral", sampling="natural", seed=0):
    return plan_epoch(LABELS, EpochSettings(augment, sampling, 0.0, 16, 1, seed), epoch)


def test_each_epoch_shows_every_image_once_in_another_order():
    first, second = plan(1), plan(2)
    assert sorted(first.rows) == sorted(second.rows) == list(range(len(LABELS)))
    assert (first.rows != second.rows).any()
    assert (first.symmetry != second.symmetry).any()
    assert set(np.unique(np.concatenate([plan(epoch).symmetry for epoch in range(1, 9)]))) == set(range(8))


def test_plan_is_deterministic_by_seed_and_epoch():
    for one, other in zip(plan(5), plan(5), strict=True):
        assert (one == other).all()
    assert (plan(5, seed=1).rows != plan(5).rows).any()


def test_x4_counts_as_the_paper_counts():
    assert images_per_epoch(8919, "x4") == 35_676
    shown = plan(augment="x4")
    assert len(shown.rows) == 4 * len(LABELS)
    seen = {(int(row), int(turn)) for row, turn in zip(shown.rows, shown.symmetry, strict=True)}
    assert seen == {(row, turn) for row in range(len(LABELS)) for turn in X4}


def test_x4_is_identity_upside_down_mirrored_and_quarter_turn():
    square = np.arange(12).reshape(1, 2, 2, 3)
    turned = [augment.apply_dihedral(square, np.array([turn]))[0] for turn in X4]
    expected = [square[0], square[0, ::-1], square[0, :, ::-1], np.rot90(square[0])]
    for got, wanted in zip(turned, expected, strict=True):
        assert (got == wanted).all()


def test_balanced_sampling_shows_grades_and_images_of_a_grade_equally_often():
    shown = plan(sampling="balanced").rows
    assert len(shown) == len(LABELS)
    assert np.ptp(np.bincount(LABELS[shown], minlength=4)) <= 1
    for grade in range(4):
        times = np.bincount(shown, minlength=len(LABELS))[grade == LABELS]
        assert np.ptp(times) <= 1


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_global_batches(workers):
    batch, steps = 16, 6
    shares = [RankBatch(rank, workers, batch) for rank in range(workers)]
    assert sum(share.size for share in shares) == batch
    alone = RankBatch(0, 1, batch).places(np.arange(3 * steps * batch), steps)
    for step in range(3 * steps):
        together = np.concatenate(
            [
                np.stack(share.places(np.arange(step * share.size, (step + 1) * share.size), steps))
                for share in shares
            ],
            axis=1,
        )
        assert (together == np.stack(alone)[:, step * batch : (step + 1) * batch]).all()


def test_colors_change_mildly_and_nothing_changes_at_zero():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    change = plan().color[:4]
    assert (augment.jitter_color(images, 0.0, change) == images).all()
    moved = augment.jitter_color(images, 0.1, change).astype(int) - images
    assert 0 < np.abs(moved).mean() < 0.2 * 255
    brighter = np.array([[1.0, 0, 0, 0, 0]] * 4)
    assert (augment.jitter_color(images, 0.1, brighter) >= images).all()


def test_the_order_of_an_epoch_is_drawn_once_for_all_its_blocks(monkeypatch):
    """Once each block of 64 drew the whole epoch: 1,700 core-seconds per epoch at a million images."""
    size, blocks = 2, 30
    labels = np.random.default_rng(3).integers(0, 4, blocks * 64).astype(np.int8)
    order = EpochSettings("dihedral", "natural", 0.1, 32, 3, seed=11)

    class Source:
        """As in a task: with unpickled labels."""

        def __init__(self):
            self.labels = labels.copy()

        def __len__(self):
            return len(self.labels)

        def labels_of(self, rows):
            return {"label": self.labels[rows]}

        def load(self, rows):
            return np.repeat(rows, 3 * size**2).reshape(-1, size, size, 3).astype(np.uint8)

    draws, draw = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws.append(seed.spawn_key) or draw(seed))
    seen = []
    for block in range(2 * blocks):
        load = _LoadRankBatch(Source(), order, RankBatch(0, 1, 32), first_epoch=1)
        seen.append(load({"id": np.arange(block * 64, (block + 1) * 64)})["label"])
    assert draws == [(Purpose.ORDER, 1), (Purpose.ORDER, 2)]
    plans = np.concatenate([plan_epoch(labels, order, epoch).rows for epoch in (1, 2)])
    assert (np.concatenate(seen) == labels[plans]).all()


def test_orders_that_differ_are_not_taken_for_each_other():
    natural, others = plan(), [plan(2), plan(seed=1), plan(sampling="balanced"), plan(augment="none")]
    fewer = plan_epoch(LABELS[:-1], EpochSettings("dihedral", "natural", 0.0, 16, 1, 0), 1)
    for other in (*others, fewer):
        assert any(
            len(one) != len(two) or (one != two).any() for one, two in zip(natural, other, strict=True)
        )
    with pytest.raises(ValueError, match="read-only"):
        natural.rows[0] = 0


def test_the_order_is_that_of_earlier_versions():
    """A resumed run sees the same images, also after an update of scalp."""
    parts = plan(3), plan(2, augment="x4", sampling="balanced", seed=5)
    found = [sha256(values.tobytes()).hexdigest()[:16] for each in parts for values in each[:3]]
    assert found == PINNED


def test_by_default_no_quarter_turn_of_a_squashed_image():
    """Squashing 640 x 480 pixels makes a round flake upright; a quarter turn makes it lie flat."""
    for resize, drawn in (("squash", {0, 2, 4, 6}), ("crop", set(range(8))), ("pad", set(range(8)))):
        plans = [plan_epoch(LABELS, Recipe(resize=resize).epoch_settings, epoch) for epoch in (1, 2)]
        assert {int(turn) for each in plans for turn in each.symmetry} == drawn
    flake = np.zeros((1, 32, 32, 3), np.uint8)
    flake[:, 8:24, 10:22] = 255  # taller than wide
    for symmetry in (0, 2, 4, 6):
        seen = augment.apply_dihedral(flake, np.array([symmetry]))[0, :, :, 0] > 0
        assert (seen.any(axis=1).sum(), seen.any(axis=0).sum()) == (16, 12)
    asked = Recipe(resize="squash", augment="dihedral").epoch_settings
    assert len(set(plan_epoch(LABELS, asked, 1).symmetry.tolist())) == 8


def test_seeds_of_purposes_epochs_and_ranks_do_not_meet():
    seeds = [
        torch_seed(seed, purpose, *keys)
        for seed in (0, 1)
        for purpose in Purpose
        for keys in [(epoch,) for epoch in range(20)]
        + [(epoch, rank) for epoch in range(20) for rank in range(8)]
    ]
    assert len(set(seeds)) == len(seeds)
    one, other = (np.random.default_rng(seed_sequence(0, Purpose.ORDER, 1)).random(4) for _ in range(2))
    assert (one == other).all()
