"""The comparison of orders of review with trained networks: it resumes, and pairs what it compares."""

import json

import numpy as np
import pytest

from scalp_core.errors import UserError
from tests.benchmarks.active_trained import (
    STRATEGIES,
    ActiveTrainedOptions,
    bench_active_trained,
    gain_over_groups,
    plan_trainings,
)

SMALL = ActiveTrainedOptions(
    photographs=60, first=20, first_epochs=1, answers=8, rounds=2, seeds=2,
    settings=("size=64", "batch_size=8", "epochs=1"),
)  # fmt: skip


def test_a_stopped_comparison_resumes(tmp_path):
    assert bench_active_trained(str(tmp_path), SMALL, most=2) is None
    files = sorted((tmp_path / "trainings").glob("*.safetensors"))
    kept = {file: file.stat().st_mtime_ns for file in files}
    assert len(kept) == 2
    bench_active_trained(str(tmp_path), SMALL)
    assert kept == {file: file.stat().st_mtime_ns for file in files}
    result = json.loads((tmp_path / "summary.json").read_text())
    rows = {(row["strategy"], row["seed"], row["round"]): row for row in result["rows"]}
    assert rows.keys() == {
        (strategy, seed, number) for strategy in STRATEGIES for seed in (0, 1) for number in (0, 1, 2)
    }
    assert {row["round"]: row["labels"] for row in result["rows"]} == {0: 20, 1: 28, 2: 36}
    assert len({row["qwk"] for (_, seed, number), row in rows.items() if (seed, number) == (0, 0)}) == 1
    with pytest.raises(UserError, match="has trainings with other options"):
        bench_active_trained(str(tmp_path), ActiveTrainedOptions(photographs=60))


def test_each_training_follows_the_one_that_it_continues():
    trainings = plan_trainings(SMALL)
    assert len(trainings) == len({training.name for training in trainings}) == 2 * (1 + 2 * len(STRATEGIES))
    for place, training in enumerate(trainings):
        assert training.number == 0 or training.before in trainings[:place]


def test_the_interval_over_microscopes_is_of_the_difference():
    labels = np.arange(80) % 4
    groups = [f"microscope {number // 8}" for number in range(80)]
    right, worse = labels, np.where(np.arange(80) % 5, labels, 0)
    same = gain_over_groups(labels, [worse, right], [right, worse], groups)
    assert same == {"groups_low": 0, "groups_high": 0}
    better = gain_over_groups(labels, [right, right], [worse, worse], groups)
    assert 0 < better["groups_low"] < better["groups_high"]
