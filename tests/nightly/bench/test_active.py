"""The comparison of orders of review: each strategy chooses what it says, and gains are paired by seed."""

import json

import numpy as np
import pytest

from scalp_core.errors import UserError
from tests.benchmarks.active import (
    STRATEGIES,
    ActiveOptions,
    bench_active,
    choose_diverse,
    choose_informative,
    gains,
)


@pytest.fixture
def pool():
    """72 certain images, and eight uncertain ones, of which the first six and the last two look alike."""
    margins = np.concatenate([np.full(72, 0.8), np.linspace(0.01, 0.08, 8)])
    likeliest, second = (1 + margins) / 2, (1 - margins) / 2
    probabilities = np.stack([likeliest, second, np.zeros(80), np.zeros(80)], axis=1)
    looks = np.concatenate([np.zeros(72), np.full(6, 5.0), np.full(2, -5.0)])
    return probabilities, np.stack([looks, np.zeros(80)], axis=1)


def test_every_strategy_chooses_different_images_of_the_pool(pool):
    for choose in STRATEGIES.values():
        chosen = choose(*pool, 10, np.random.default_rng(0))
        assert len(set(chosen)) == len(chosen) <= 10 and set(chosen) <= set(range(80))


def test_informative_takes_the_smallest_margins(pool):
    assert list(choose_informative(*pool, 3, np.random.default_rng(0))) == [72, 73, 74]


def test_diverse_takes_the_least_certain_of_each_look(pool):
    assert sorted(choose_diverse(*pool, 2, np.random.default_rng(0))) == [72, 78]


def test_a_gain_is_paired_by_seed():
    rows = [
        {"strategy": name, "seed": seed, "round": 1, "qwk": 0.5 + seed / 10 + gain}
        for name, gain in (("random", 0), ("informative", 0.02), ("informative, diverse", -0.01))
        for seed in range(4)
    ]
    found = gains(rows, 1)
    assert found["informative"] == [{"gain": 0.02, "low": 0.02, "high": 0.02}]
    assert found["informative, diverse"][0]["gain"] == -0.01


@pytest.mark.slow
def test_a_small_comparison_has_a_row_for_each_strategy_round_and_seed(tmp_path):
    options = ActiveOptions(photographs=100, first=20, answers=10, rounds=2, seeds=2)
    bench_active(str(tmp_path), options)
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert len(rows) == len(STRATEGIES) * 3 * 2
    starts = {(row["seed"], row["qwk"]) for row in rows if row["round"] == 0}
    assert len(starts) == 2  # each strategy starts from the same labels
    with pytest.raises(UserError, match="the pool has .* images, fewer than"):
        bench_active(str(tmp_path / "more"), ActiveOptions(photographs=60, first=200))
