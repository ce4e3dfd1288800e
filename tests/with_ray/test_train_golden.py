"""Training on two workers, in pieces of a batch, has the losses of a plain loop; and what ends it early."""

import numpy as np
import pytest
import torch

from jobs.cli.options import parse_range
from jobs.train.driver import count_grades, train
from jobs.train.ingest import ImageSource, _LoadRankBatch, cache_images
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.inference.predictor import has_bf16
from scalp_core.models.architecture import preprocess_for, to_channels_last
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.losses import make_losses
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import RankBatch
from scalp_core.models.training_step import TrainingStep
from scalp_core.storage import outputs


def plain_losses(recipe: Recipe, source: ImageSource) -> list[float]:
    """Losses of the steps of a loop in this process: no workers, each batch in one piece."""
    model, _ = initial_model(recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size)
    losses = make_losses(recipe.loss, recipe.label_smoothing, count_grades(source.labels), recipe.softness)
    batch_size = recipe.batch_size
    steps = len(source) // batch_size * recipe.epochs
    step = TrainingStep(
        to_channels_last(model),
        recipe.model_copy(update={"accumulate": 1}),
        losses,
        source.spec,
        steps,
        recipe.resolve_batch_norm(1),
        has_bf16("cpu"),
    )
    step.start_average()
    step.wrap(frozen=False)
    step.train_mode()
    load = _LoadRankBatch(source, recipe.epoch_settings, RankBatch(0, 1, batch_size), 1)
    values = []
    for number in range(steps):
        batch = load({"id": np.arange(batch_size) + number * batch_size})
        sums = step(torch.from_numpy(batch["image"]), torch.from_numpy(batch["label"]).long())
        values.append(float(sums[0]))
    return values


def test_two_workers_and_pieces_of_a_batch_give_the_losses_of_a_plain_loop(pipeline):
    rows = manifest.select_training(manifest.read_manifest(str(pipeline.data)))
    recipe = pipeline.recipe
    model, _ = initial_model(recipe.architecture, recipe.weights, recipe.seed, recipe.head, recipe.size)
    source, _ = cache_images(rows, preprocess_for(model, recipe.size, recipe.resize), 0)
    one = plain_losses(recipe, source)
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
