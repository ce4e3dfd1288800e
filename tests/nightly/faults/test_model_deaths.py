"""A model whose process dies in one shard: a few times is survived, again and again ends the run."""

import os
from pathlib import Path

import pytest

from jobs.common.executor import PipelineSize
from jobs.common.isolate import MOST_TRIES
from jobs.common.ray_executor import RayExecutor
from scalp_core.errors import UserError


class Mortal:
    """Dies in a shard as often as its name says after the dash."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, batch):
        shard = batch["shard"]
        deaths = self._folder / shard
        died = len(deaths.read_text()) if deaths.exists() else 0
        if died < int(shard.partition("-")[2] or 0):
            deaths.write_text("x" * (died + 1))
            os._exit(1)
        return {"shard": shard}


def _load(batch, tries):
    yield batch


def graded(shards, tmp_path, threads=1):
    items = [{"shard": shard} for shard in shards]
    size = PipelineSize(loaders=1, models=(1, 1), cpus_per_model=1, gpus_per_model=0, threads=threads)
    rows = RayExecutor().pipeline(items, _load, Mortal, (str(tmp_path),), size)
    return sorted(row["shard"] for row in rows)


def test_a_few_deaths_of_a_model_are_survived(cluster, tmp_path):
    shards = ["a", f"b/000-{MOST_TRIES - 1}", "c"]
    (tmp_path / "b").mkdir()
    assert graded(shards, tmp_path) == shards


def test_a_shard_in_which_models_die_again_and_again_ends_the_run_and_is_named(cluster, tmp_path):
    with pytest.raises(UserError, match="died 4 times while they graded shard b-99; .*--batch-size"):
        graded(["a", "b-99", "c", "d"], tmp_path)
    assert len((tmp_path / "b-99").read_text()) == MOST_TRIES + 1


def test_a_shard_that_ends_models_next_to_another_is_among_those_named(cluster, tmp_path):
    with pytest.raises(UserError, match=r"died 4 times while they graded shard .*b-99"):
        graded(["a", "b-99", "c", "d"], tmp_path, threads=2)


class StillBorn:
    def __init__(self) -> None:
        os._exit(1)


def test_a_model_that_always_dies_while_it_loads_ends_the_run(cluster):
    size = PipelineSize(loaders=1, models=(1, 1), cpus_per_model=1, gpus_per_model=0)
    with pytest.raises(UserError, match="models died 3 times in a row while they loaded"):
        list(RayExecutor().pipeline([{"shard": "a"}], _load, StillBorn, (), size))
