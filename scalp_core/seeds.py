"""Seeds of independent random streams, derived from the one seed of a recipe."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is drawn for; the numbers are part of every derived seed."""

    ORDER = 0
    DROPOUT = 1


def seed_sequence(seed: int, purpose: Purpose, *keys: int) -> np.random.SeedSequence:
    """A sequence for one purpose and its keys, such as epoch and rank; others are independent of it."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *keys))


def torch_seed(seed: int, purpose: Purpose, *keys: int) -> int:
    """The same as a number for `torch.manual_seed`."""
    return int(seed_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0])
