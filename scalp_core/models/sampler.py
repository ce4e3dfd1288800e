"""The sampler: the order and augmentation of the images per epoch, as a function of recipe, epoch and labels.

Training itself draws no random numbers for them. So any number of workers sees the same global batches, and a
resumed run continues with the same images.
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

# The paper's: unchanged, upside down, mirrored, quarter turn; numbered as in `augment.apply_dihedral`.
X4 = (0, 6, 4, 1)

# Plans cached per process: blocks of two epochs are loaded concurrently, in a search those of several trials.
# One plan of a million images takes 49 MB.
_CACHED_PLANS = 4


class EpochSettings(NamedTuple):
    """The fields of a recipe that determine its epochs."""

    augment: ResolvedAugment
    sampling: Sampling
    color_jitter: float
    batch_size: int
    epochs: int
    seed: int
    min_crop: float = 1.0
    blur: float = 0.0
    jpeg_quality: int = 100


class EpochPlan(NamedTuple):
    """The images of one epoch, in order.

    Args:
        rows: int64 (M,), row numbers of the training split.
        symmetry: int8 (M,), symmetry of each image for `augment.apply_dihedral`.
        color: float32 (M, 5) in -1..1, color change of each image for `augment.jitter_color`.
        crop: float32 (M, 3) in -1..1, for `augment.crop_squares`.
        quality: float32 (M, 2) in -1..1, for `augment.degrade`.
    """

    rows: np.ndarray
    symmetry: np.ndarray
    color: np.ndarray
    crop: np.ndarray
    quality: np.ndarray


def resolve_augment(augment: Augment, resize: Resize) -> ResolvedAugment:
    """Resolve `auto` to the symmetries that preserve shapes after this resize mode."""
    if augment != "auto":
        return augment
    return "flips" if resize == "squash" else "dihedral"


def images_per_epoch(rows: int, augment: Augment) -> int:
    """Count the images per epoch; `x4` counts each four times, like the paper (8,919 are 35,676)."""
    return rows * len(X4) if augment == "x4" else rows


def plan_epoch(labels: np.ndarray, settings: EpochSettings, epoch: int) -> EpochPlan:
    """Plan the order and the augmentation of an epoch, as read-only arrays.

    The plan is cached per process: each block of 64 images needs it, and drawing it takes 0.1 s for a million
    images.

    Args:
        labels: int (N,), 0..3.
        settings: Settings of the epochs. `augment`: `flips` draws one of four symmetries per image,
            `dihedral` one of eight, `x4` shows each image in four. `sampling`: `balanced` shows all grades
            that occur equally often, and repeats rare images.
        epoch: Number of the epoch, from 1.
    """
    content = np.ascontiguousarray(labels, np.int8).tobytes()
    return _draw_plan(content, settings.augment, settings.sampling, settings.seed, epoch)


@lru_cache(_CACHED_PLANS)
def _draw_plan(
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
    changes = [draw.uniform(-1, 1, (len(rows), count)).astype(np.float32) for count in (5, 3, 2)]
    plan = EpochPlan(rows[places], symmetry[places], *changes)
    for values in plan:
        values.flags.writeable = False  # the cache shares them
    return plan


def _balanced(labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draw as many rows as there are labels, equally many per grade, cycling through its images."""
    grades = np.unique(labels)
    counts = [len(part) for part in np.array_split(np.arange(len(labels)), len(grades))]
    rows = [
        np.resize(draw.permutation(np.flatnonzero(labels == grade)), count)
        for grade, count in zip(grades, counts, strict=True)
    ]
    return np.concatenate(rows)


class RankBatch(NamedTuple):
    """The slice of each global batch that one rank processes; sizes of ranks differ by at most one row."""

    rank: int
    workers: int
    batch_size: int

    @property
    def start(self) -> int:
        """First row of the slice in the global batch."""
        return self.rank * self.batch_size // self.workers

    @property
    def size(self) -> int:
        """Images per step of this rank."""
        return (self.rank + 1) * self.batch_size // self.workers - self.start

    def places(self, rows: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Locate rows of this rank's stream: (epochs after the first one, position in that epoch).

        Args:
            rows: int (N,), positions in the stream, which begins with an epoch.
            steps: Global batches per epoch.
        """
        step, offset = np.divmod(rows, self.size)
        epoch, within = np.divmod(step, steps)
        return epoch, within * self.batch_size + self.start + offset
