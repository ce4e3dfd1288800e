"""Seeds of independent random streams, derived from the seed of a recipe."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Purpose of a random stream; its number is part of the derived seed."""

    ORDER = 0
    DROPOUT = 1


def seed_sequence(seed: int, purpose: Purpose, *keys: int) -> np.random.SeedSequence:
    """Seed sequence for a purpose and its keys, such as epoch and rank, independent of all others."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *keys))


def torch_seed(seed: int, purpose: Purpose, *keys: int) -> int:
    """`seed_sequence` as a number for `torch.manual_seed`."""
    return int(seed_sequence(seed, purpose, *keys).generate_state(1, np.uint64)[0])
