"""What each epoch shows to the model, in which order: a function of recipe, epoch and labels.

Nothing is drawn while training runs, so one worker or eight see the same batches, and a run that was stopped
goes on with the photographs that it would have seen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from scalp_core.images.augment import symmetries
from scalp_core.images.preprocess import Resize
from scalp_core.seeds import Purpose, seed_sequence

Augment = Literal["auto", "flips", "dihedral", "x4", "none"]
ResolvedAugment = Literal["flips", "dihedral", "x4", "none"]
Sampling = Literal["natural", "balanced"]

# The paper's: as it is, upside down, mirrored, by a quarter turn; numbered as in `augment.dihedral`.
X4 = (0, 6, 4, 1)

# Plans that a process keeps: blocks of two epochs are loaded at the same time, in a search those of several
# trials. One plan of a million images takes 29 MB.
_PLANS_KEPT = 4


class EpochSettings(NamedTuple):
    """What of a recipe decides on its epochs; its fields are the recipe's."""

    augment: ResolvedAugment
    sampling: Sampling
    colour_jitter: float
    batch_size: int
    epochs: int
    seed: int


class EpochPlan(NamedTuple):
    """One epoch, in order.

    Args:
        rows: int64 (M,), into the training part.
        symmetry: int8 (M,), for `augment.dihedral`.
        color: float32 (M, 5) in -1..1, for `augment.jitter_color`.
    """

    rows: np.ndarray
    symmetry: np.ndarray
    color: np.ndarray


def resolve_augment(augment: Augment, resize: Resize) -> ResolvedAugment:
    """`auto` takes the symmetries that keep the shapes of the resized images."""
    if augment != "auto":
        return augment
    return "flips" if resize == "squash" else "dihedral"


def images_per_epoch(rows: int, augment: Augment) -> int:
    """How many the model sees in an epoch; `x4` counts each four times, as the paper (8,919 are 35,676)."""
    return rows * len(X4) if augment == "x4" else rows


def plan_epoch(labels: np.ndarray, order: EpochSettings, epoch: int) -> EpochPlan:
    """The order of an epoch and how each photograph is turned in it; read-only arrays.

    A process draws the plan of an epoch once. Every block of 64 images asks for it, and drawing it takes
    0.1 s for a million images.

    Args:
        labels: int (N,), 0..3.
        order: its `augment` `flips` draws one of four symmetries for each photograph, `dihedral` one of
            eight, and `x4` shows it in four; its `sampling` `balanced` shows every grade that occurs equally
            often, rare ones again.
        epoch: the first is 1.
    """
    content = np.ascontiguousarray(labels, np.int8).tobytes()
    return _drawn_plan(content, order.augment, order.sampling, order.seed, epoch)


@lru_cache(_PLANS_KEPT)
def _drawn_plan(
    content: bytes, augment: ResolvedAugment, sampling: Sampling, seed: int, epoch: int
) -> EpochPlan:
    labels = np.frombuffer(content, np.int8)
    draw = np.random.default_rng(seed_sequence(seed, Purpose.ORDER, epoch))
    rows = np.arange(len(labels)) if sampling == "natural" else _balanced(labels, draw)
    if augment == "x4":
        rows, symmetry = np.repeat(rows, len(X4)), np.tile(np.array(X4, np.int8), len(rows))
    elif augment != "none":
        symmetry = draw.choice(symmetries(turns=augment == "dihedral"), len(rows))
    else:
        symmetry = np.zeros(len(rows), np.int8)
    places = draw.permutation(len(rows))
    color = draw.uniform(-1, 1, (len(rows), 5)).astype(np.float32)
    plan = EpochPlan(rows[places], symmetry[places], color)
    for values in plan:
        values.flags.writeable = False  # shared by all who ask for it
    return plan


def _balanced(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """As many rows as there are labels, every grade alike, a grade's photographs in turn."""
    grades = np.unique(labels)
    shares = [len(part) for part in np.array_split(np.arange(len(labels)), len(grades))]
    picked = [
        np.resize(draw.permutation(np.flatnonzero(labels == grade)), share)
        for grade, share in zip(grades, shares, strict=True)
    ]
    return np.concatenate(picked)


class RankBatch(NamedTuple):
    """The part of every global batch that is one worker's; equal, or one row apart."""

    rank: int
    workers: int
    batch_size: int

    @property
    def start(self) -> int:
        return self.rank * self.batch_size // self.workers

    @property
    def size(self) -> int:
        """Photographs a step of this worker."""
        return (self.rank + 1) * self.batch_size // self.workers - self.start

    def places(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Where rows of this worker's stream lie: (epochs after the first, place in that epoch's order).

        Args:
            rows: int (N,), of the stream that begins with an epoch.
            steps: global batches an epoch.
        """
        step, offset = np.divmod(rows, self.size)
        epoch, within = np.divmod(step, steps)
        return epoch, within * self.batch_size + self.start + offset
