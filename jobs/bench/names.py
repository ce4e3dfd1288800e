"""Names of the images that `scalp bench scale` draws or simulates."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from scalp_core.grades import GRADE_NAMES_KO, SYMPTOMS

FOLDERS = 64

_SHARES = np.cumsum((0.05, 0.35, 0.43, 0.17))  # of the grades, about as in the paper
DEVICES = 100
SHOTS = 5
START_MS = int(datetime(2020, 10, 13, tzinfo=UTC).timestamp() * 1000)


def image_names(number: int, step: int = 1, start: int = 0) -> Iterator[tuple[int, str]]:
    """Index, and path below the source, of each image: AI Hub's layout, people with five shots."""
    for index in range(start, number, step):
        person = index // SHOTS
        grade = int(grades_of(index))
        folder = f"[원천]{SYMPTOMS[0]}_{grade}.{GRADE_NAMES_KO[grade]}"
        device = person % DEVICES
        stem = f"{device:04d}_A2LEBJJDE{device:05d}O_{START_MS + person * 60_000}_{index % SHOTS + 2}_TH"
        part = "Training" if index % 9 < 7 else "Validation"
        yield index, f"{part}/{folder}/{stem}.jpg"


def grades_of(indices: Any) -> Any:
    """Grades in their shares, spread evenly: multiples of the golden ratio."""
    return np.minimum(np.searchsorted(_SHARES, np.asarray(indices) * 0.6180339887498949 % 1), 3)
