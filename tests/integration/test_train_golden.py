"""Training gives the same curve on one worker or two, stopped or not, in one piece or several."""

import pytest

from jobs.train import parse_workers, train
from scalp_core.bundle import load_bundle
from scalp_core.errors import UserError

# Without batch normalisation, whose statistics are of each worker's own photographs.
RECIPE = {"architecture": "convnext_atto", "epochs": 4, "learning_rate": 1e-3, "weight_decay": 0.05}


def curve(summary):
    return [loss for entry in summary["history"] for loss in entry["step_losses"]]


@pytest.fixture(scope="module")
def trained(way, tmp_path_factory):
    """Trains as asked; the run's summary."""
    made = {}

    def run(name, workers=1, **changes):
        if name not in made:
            recipe = way.recipe.model_copy(update=RECIPE | changes)
            folder = tmp_path_factory.mktemp("golden") / name
            made[name] = train(str(way.data), str(folder), recipe, workers, "cpu"), folder
        return made[name]

    return run


def test_two_workers_give_the_losses_of_one(trained):
    alone, together = curve(trained("one")[0]), curve(trained("two", workers=2)[0])
    assert len(alone) == len(together) >= 20
    assert together[:20] == pytest.approx(alone[:20], rel=0.02)


def test_the_pieces_of_a_batch_add_up_to_the_batch(trained):
    whole, pieces = curve(trained("one")[0]), curve(trained("pieces", accumulate=4)[0])
    assert pieces[:20] == pytest.approx(whole[:20], rel=0.02)


def test_the_paper_s_order_of_things_with_every_option_on(way, tmp_path):
    changes = {
        "epochs": 2, "frozen_epochs": 1, "loss": "corn", "sampling": "balanced", "augment": "x4",
        "ema_decay": 0.9, "colour_jitter": 0.1, "layer_decay": 0.8, "batch_size": 32,
    }  # fmt: skip
    recipe = way.recipe.model_copy(update=RECIPE | {"architecture": "resnet18"} | changes)
    summary = train(str(way.data), str(tmp_path / "run"), recipe, 1, "cpu")
    rows = sum(load_bundle(str(tmp_path / "run")).spec.training.grade_counts)
    assert {entry["steps"] for entry in summary["history"]} == {4 * rows // 32}
    assert load_bundle(str(tmp_path / "run")).spec.head == "corn"
    assert summary["validation"]["n"] == summary["history"][0]["val_n"]


@pytest.mark.parametrize(
    ("words", "message"),
    [("many", "write a number"), ("0", "write a number"), ("1:2:3", "write a number"), ("4:2", "2:4")],
)
def test_a_wrong_number_of_workers_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        parse_workers(words)


def test_workers_are_a_number_or_a_range():
    assert [parse_workers(words) for words in (None, "3", "1:4")] == [None, (3, 3), (1, 4)]


def test_settings_that_cannot_be_are_refused_before_anything_is_written(way, tmp_path):
    for changes, message in (
        ({"sync_batchnorm": True}, "sync_batchnorm works on GPUs only"),
        ({"accumulate": 16}, "batch_size 16 is less than 2 for each of 2 workers"),
        ({"batch_size": 4096}, "do not fill one batch of 4096"),
    ):
        with pytest.raises(UserError, match=message):
            train(str(way.data), str(tmp_path / "run"), way.recipe.model_copy(update=changes), 2, "cpu")
    assert not (tmp_path / "run").exists()
