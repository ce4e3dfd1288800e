"""Plots show titles, warnings and markers."""

import pytest

from scalp_core.evaluation import figures

HISTORY = [
    {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.1, "train_top1": 0.5, "val_top1": 0.4, "val_qwk": 0.3}
    for epoch in (1, 2)
]


@pytest.mark.medium
def test_the_warning_of_a_leaky_split_is_on_the_curves():
    plain, again = figures.plot_curves(HISTORY, 2), figures.plot_curves(HISTORY, 2)
    assert plain == again
    assert figures.plot_curves(HISTORY, 2, "LEAKY SPLIT: metrics are too optimistic") != plain


@pytest.mark.medium
def test_search_plot_shows_warning_and_best_trial():
    def drawn(order, title="kappa on validation"):
        trials = [
            {"number": number, "settings": {"learning_rate": number / 100, "loss": "corn"},
             "status": "finished", "history": HISTORY[:number]}
            for number in order
        ]  # fmt: skip
        return figures.plot_search(
            trials, {"learning_rate": "log", "loss": ("corn", "cross_entropy")}, 2, title
        )

    assert drawn([1, 2]) == drawn([1, 2])
    assert len({drawn([1]), drawn([1, 2]), drawn([2, 1]), drawn([1, 2], "LEAKY")}) == 4


@pytest.mark.medium
def test_search_plot_omits_settings_without_an_effect():
    def drawn(*smoothing):
        trials = [
            {"number": number, "settings": settings, "status": "finished", "history": HISTORY}
            for number, settings in enumerate(smoothing, 1)
        ]
        return figures.plot_search(trials, {"label_smoothing": "log"}, 2, "kappa on validation")

    some, none = drawn({"label_smoothing": 0.1}, {}), drawn({}, {})
    assert len({some, none, drawn({"label_smoothing": 0.1}, {"label_smoothing": 0.1})}) == 3
