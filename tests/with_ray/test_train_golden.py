"""Training on two workers, in pieces of a batch, has the losses of a plain loop; and what ends it early."""

import pytest

from jobs.cli.options import parse_range
from jobs.train.driver import train
from jobs.train.ingest import cache_images
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.storage import outputs
from tests.benchmarks.transfer import train_alone


def test_two_workers_and_pieces_of_a_batch_give_the_losses_of_a_plain_loop(pipeline):
    rows = manifest.select_training(manifest.read_manifest(str(pipeline.data)))
    recipe = pipeline.recipe
    spec = load_bundle(str(pipeline.run)).spec.preprocess
    source, _ = cache_images(rows, spec, 0)
    steps = len(source) // recipe.batch_size * recipe.epochs
    *_, one = train_alone(recipe.model_copy(update={"accumulate": 1}), source, steps)
    two = [loss for entry in pipeline.trained["history"] for loss in entry["step_losses"]]
    assert recipe.accumulate == 2
    assert {entry["workers"] for entry in pipeline.trained["history"]} == {2}
    assert len(one) == len(two) >= 20
    assert two[:20] == pytest.approx(one[:20], rel=0.02)
    assert sum(one[-6:]) < sum(one[:6])


@pytest.mark.slow
def test_the_paper_s_order_of_things_with_every_option_on_in_object_storage(pipeline):
    run = "s3://scalp/golden/run"
    changes = {
        "epochs": 2, "frozen_epochs": 1, "loss": "corn", "sampling": "balanced", "augment": "x4",
        "ema_decay": 0.9, "color_jitter": 0.1, "layer_decay": 0.8, "batch_size": 32, "accumulate": 1,
    }  # fmt: skip
    recipe = pipeline.recipe.model_copy(update={"architecture": "resnet18"} | changes)
    summary = train(str(pipeline.data), run, recipe, 1, "cpu")
    bundle = load_bundle(run).spec
    assert {entry["steps"] for entry in summary["history"]} == {4 * sum(bundle.training.grade_counts) // 32}
    assert bundle.head == "corn"
    assert train(str(pipeline.data), run, recipe, 1, "cpu") == summary  # finished: read, not trained again
    assert summary["validation"]["n"] == summary["history"][0]["val_n"]


@pytest.mark.parametrize(
    ("words", "message"),
    [("many", "write a number"), ("0", "write a number"), ("1:2:3", "write a number"), ("4:2", "2:4")],
)
def test_a_wrong_number_of_workers_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse_range("--workers", words)


def test_workers_are_a_number_or_a_range():
    assert [parse_range("--workers", words) for words in (None, "3", "1:4")] == [None, (3, 3), (1, 4)]


def test_settings_that_cannot_be_are_refused_before_anything_is_written(pipeline, tmp_path):
    for changes, message in (
        ({"accumulate": 16}, "batch_size 16 is less than 2 images for each of 2 workers"),
        ({"batch_size": 4096}, "do not fill one batch of 4096"),
    ):
        with pytest.raises(UserError, match=message):
            train(
                str(pipeline.data),
                str(tmp_path / "run"),
                pipeline.recipe.model_copy(update=changes),
                2,
                "cpu",
            )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_once_with_a_line(pipeline, tmp_path, capsys):
    """Without this, Ray tried again what ended in the same way, and the weights were NaN."""
    changes = {
        "architecture": "test_resnet", "learning_rate": 1e30, "gradient_clip": 0.0, "epochs": 2,
        "accumulate": 1,
    }  # fmt: skip
    run = str(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"the loss is not finite at step \d+ of \d+ in epoch 1; use a smaller"
    ):
        train(str(pipeline.data), run, pipeline.recipe.model_copy(update=changes), 2, "cpu")
    out = capsys.readouterr().out
    assert "batch normalization: over the 16 images of all workers per micro-batch, about 8 per worker" in out
    assert out.count("starting, workers") == 1 and "workers failed" not in out


def test_a_run_that_another_process_holds_is_refused(pipeline, tmp_path):
    run = str(tmp_path / "run")
    recipe = pipeline.recipe.model_copy(update={"architecture": "test_resnet"})
    with outputs.open_output(run, "train"), pytest.raises(UserError, match="run is in use by scalp train on"):
        train(str(pipeline.data), run, recipe, 1, "cpu")
    assert not (tmp_path / "run" / "run.json").exists()
