"""Pictures say what they were told to say."""

from scalp_core import report

HISTORY = [
    {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.1, "train_top1": 0.5, "val_top1": 0.4, "val_qwk": 0.3}
    for epoch in (1, 2)
]


def test_the_warning_of_a_leaky_split_is_on_the_curves():
    plain, again = report.curves(HISTORY, 2), report.curves(HISTORY, 2)
    assert plain == again
    assert report.curves(HISTORY, 2, "LEAKY SPLIT: the figures flatter") != plain
