"""Pictures: training curves, confusion matrix. Each function returns PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scalp_core.grades import GRADE_NAMES, NUM_GRADES

_TRAIN, _VAL = "#1f5fa8", "#c8541f"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def curves(history: list[dict[str, Any]], best_epoch: int, title: str = "") -> bytes:
    """Loss and accuracy by epoch, training and validation.

    Args:
        history: for each epoch `epoch, train_loss, val_loss, train_top1, val_top1, val_qwk`.
        best_epoch: the one that was kept.
        title: above both; what a reader of the curves must know.
    """
    epochs = [entry["epoch"] for entry in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric, title in ((left, "loss", "log loss"), (right, "top1", "top-1 accuracy, kappa")):
        for part, colour in (("train", _TRAIN), ("val", _VAL)):
            values = [entry[f"{part}_{metric}"] for entry in history]
            axis.plot(
                epochs, values, "o-", color=colour, label="training" if part == "train" else "validation"
            )
        axis.set(xlabel="epoch", title=title)
        axis.axvline(best_epoch, color="grey", linestyle=":", label=f"kept: epoch {best_epoch}")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylim(bottom=0)
    right.plot(
        epochs, [entry["val_qwk"] for entry in history], "s--", color="#3a8a3a", label="validation QWK"
    )
    # An untrained model's kappa can be below zero; everything above is a share.
    right.set_ylim(min(0.0, *(entry["val_qwk"] for entry in history)), 1)
    left.legend()
    right.legend()
    figure.suptitle(title)
    return _png(figure)


def confusion_matrix(matrix: Sequence[Sequence[int]], title: str) -> bytes:
    """Counts, shaded by the share of each true grade.

    Args:
        matrix: (4, 4), rows are the labels, columns the predicted grades.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [f"{index} {name}" for index, name in enumerate(GRADE_NAMES)]
    axis.set(xticks=range(NUM_GRADES), yticks=range(NUM_GRADES), xticklabels=names, yticklabels=names)
    axis.set(xlabel="predicted", ylabel="label", title=title)
    for row in range(NUM_GRADES):
        for column in range(NUM_GRADES):
            axis.text(
                column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center",
                color="white" if shares[row, column] > 0.5 else "black",
            )  # fmt: skip
    figure.colorbar(picture, ax=axis, shrink=0.8, label="share of the label's row")
    return _png(figure)
