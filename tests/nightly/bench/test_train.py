"""The bench measures what it says; how fast it is on this machine is no test."""

import json

import pytest

from jobs.train.driver import RECIPES
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.models.recipe import Recipe, load_recipe
from tests.benchmarks.loops import Loop
from tests.benchmarks.train import TrainOptions, bench_train, ratios, run_loop, steady_epochs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), [("plain", 1), ("tuned", 2)])
def test_a_loop_trains_every_epoch_on_the_same_photographs(pipeline, tmp_path, kind, processes):
    recipe = load_recipe("default", RECIPES, ["size=32", "epochs=3", "batch_size=32", "weights=none"])
    loop = Loop(kind=kind, device="cpu", recipe=recipe, threads=1)
    rows = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "train").num_rows
    epochs = run_loop(tmp_path, str(pipeline.data), loop, processes, rows // 32 * 32)
    assert len(epochs) == 2  # the first is warm-up
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    rates = [epoch["photographs_per_second"] for epoch in epochs]
    assert rates == pytest.approx([rows // 32 * 32 / each for each in seconds[1:]])


def test_a_loop_that_fails_says_why(tmp_path):
    loop = Loop(kind="plain", device="cpu", recipe=Recipe(architecture="no_such"))
    with pytest.raises(RuntimeError, match="no architecture 'no_such'"):
        run_loop(tmp_path, str(tmp_path), loop, 1, 8)


def test_a_training_tells_what_the_bench_reads(pipeline):
    steady = steady_epochs(pipeline.trained)
    assert len(steady) == pipeline.recipe.epochs - 1
    assert all(epoch["photographs_per_second"] > 0 for epoch in steady)
    assert all(0 <= epoch["data_wait_share"] < 1 for epoch in steady)


def test_ratios_are_of_the_rows_they_name():
    rates = {
        "PyTorch, Pillow and fp32": 5,
        "PyTorch, tuned, 1 process": 10,
        "scalp train, 1 worker": 9,
        "PyTorch, tuned, torchrun, 2 processes": 16,
        "scalp train, 2 workers": 18,
    }
    rows = [{"what": what, "photographs_per_second": rate} for what, rate in rates.items()]
    rows[2]["data_wait_share"], rows[4]["data_wait_share"] = 0.01, 0.02
    assert ratios(rows, 2) == {
        "vs_torchrun": 18 / 16,
        "default_vs_tuned_loop": 0.9,
        "vs_plain": 1.8,
        "data_wait_share": 0.02,
        "scaling_2_workers": 2.0,
        "torchrun_scaling_2_processes": 1.6,
    }


def test_one_worker_is_compared_with_what_is_not_parallel():
    rates = {"PyTorch, Pillow and fp32": 5, "PyTorch, tuned, 1 process": 10, "scalp train, 1 worker": 9}
    rows = [{"what": what, "photographs_per_second": rate} for what, rate in rates.items()]
    rows[2]["data_wait_share"] = 0.01
    assert ratios(rows, 1) == {"default_vs_tuned_loop": 0.9, "vs_plain": 1.8, "data_wait_share": 0.01}


def test_one_epoch_has_no_steady_state(tmp_path):
    with pytest.raises(UserError, match="--epochs 1: .* use 2 or more"):
        bench_train(str(tmp_path), TrainOptions("cpu", epochs=1))
