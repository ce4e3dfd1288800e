"""The order of training: the same for any number of workers, complete, and drawn anew in every epoch."""

import numpy as np
import pytest

from scalp_core import augment
from scalp_core.epochs import X4, Order, Share, epoch_plan, photographs_an_epoch

LABELS = np.repeat([0, 1, 2, 3], [3, 40, 50, 12]).astype(np.int8)


def plan(epoch=1, augment="dihedral", sampling="natural", seed=0):
    return epoch_plan(LABELS, Order(augment, sampling, 0.0, 16, 1, seed), epoch)


def test_an_epoch_shows_every_photograph_once_in_an_order_of_its_own():
    first, second = plan(1), plan(2)
    assert sorted(first.rows) == sorted(second.rows) == list(range(len(LABELS)))
    assert (first.rows != second.rows).any()
    assert (first.symmetry != second.symmetry).any()
    assert set(np.unique(np.concatenate([plan(epoch).symmetry for epoch in range(1, 9)]))) == set(range(8))


def test_the_same_seed_and_epoch_give_the_same_again():
    for one, other in zip(plan(5), plan(5), strict=True):
        assert (one == other).all()
    assert (plan(5, seed=1).rows != plan(5).rows).any()


def test_x4_counts_as_the_paper_counts():
    assert photographs_an_epoch(8919, "x4") == 35_676
    shown = plan(augment="x4")
    assert len(shown.rows) == 4 * len(LABELS)
    seen = {(int(row), int(turn)) for row, turn in zip(shown.rows, shown.symmetry, strict=True)}
    assert seen == {(row, turn) for row in range(len(LABELS)) for turn in X4}


def test_the_paper_s_four_are_as_is_upside_down_mirrored_and_a_quarter_turn():
    square = np.arange(12).reshape(1, 2, 2, 3)
    turned = [augment.dihedral(square, np.array([turn]))[0] for turn in X4]
    expected = [square[0], square[0, ::-1], square[0, :, ::-1], np.rot90(square[0])]
    for got, wanted in zip(turned, expected, strict=True):
        assert (got == wanted).all()


def test_balanced_shows_every_grade_equally_often_and_no_photograph_much_more_than_its_like():
    shown = plan(sampling="balanced").rows
    assert len(shown) == len(LABELS)
    assert np.ptp(np.bincount(LABELS[shown], minlength=4)) <= 1
    for grade in range(4):
        times = np.bincount(shown, minlength=len(LABELS))[grade == LABELS]
        assert np.ptp(times) <= 1


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_global_batches(workers):
    batch, steps = 16, 6
    shares = [Share(rank, workers, batch) for rank in range(workers)]
    assert sum(share.size for share in shares) == batch
    alone = Share(0, 1, batch).places(np.arange(3 * steps * batch), steps)
    for step in range(3 * steps):
        together = np.concatenate(
            [
                np.stack(share.places(np.arange(step * share.size, (step + 1) * share.size), steps))
                for share in shares
            ],
            axis=1,
        )
        assert (together == np.stack(alone)[:, step * batch : (step + 1) * batch]).all()


def test_colours_change_mildly_and_nothing_changes_at_zero():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    change = plan().colour[:4]
    assert (augment.jitter_colour(images, 0.0, change) == images).all()
    moved = augment.jitter_colour(images, 0.1, change).astype(int) - images
    assert 0 < np.abs(moved).mean() < 0.2 * 255
    brighter = np.array([[1.0, 0, 0, 0, 0]] * 4)
    assert (augment.jitter_colour(images, 0.1, brighter) >= images).all()
