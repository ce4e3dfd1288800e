"""Fit gates on statistics of which some are junk. Detection on images: `test_statistics.py`."""

import numpy as np
import pytest

from scalp_core.images import gates as image_gates
from scalp_core.images.statistics import STATISTICS

COUNT = len(STATISTICS)
MIXING = np.random.default_rng(3).normal(size=(COUNT, COUNT)) * 0.4 + np.eye(COUNT)


def scalps(rng: np.random.Generator, images: int) -> np.ndarray:
    return (rng.normal(size=(images, COUNT)) @ MIXING * 0.3).astype(np.float32)


def junk(rng: np.random.Generator, images: int) -> np.ndarray:
    return (6 + rng.normal(size=(images, COUNT)) * 0.3).astype(np.float32)


def with_junk(rng: np.random.Generator, images: int, share: float) -> np.ndarray:
    count = round(share * images)
    return np.concatenate([junk(rng, count), scalps(rng, images - count)])


@pytest.mark.medium
@pytest.mark.parametrize("share", [0, 0.002, 0.02, 0.05, 0.1])
def test_junk_in_training_and_validation_is_flagged_and_scalps_are_not(share):
    """With 2 % of junk, a plain covariance flagged 1 % of it."""
    rng = np.random.default_rng(5)
    gates = image_gates.fit_gates(with_junk(rng, 2000, share), with_junk(rng, 600, share))
    assert (image_gates.unlikeness(junk(rng, 300), gates) > 1).mean() > 0.99
    assert (image_gates.unlikeness(scalps(rng, 3000), gates) > 1).mean() < 0.01
    assert gates.photographs == pytest.approx(2000 * (1 - share), rel=0.01)


@pytest.mark.medium
def test_a_microscope_of_its_own_kind_is_not_junk():
    rng = np.random.default_rng(6)
    train = with_junk(rng, 3000, 0.05)
    groups = ["other"] * 150 + [f"microscope {index % 20}" for index in range(2850)]
    gates = image_gates.fit_gates(train, scalps(rng, 600), groups)
    assert gates.photographs == 3000
    assert (image_gates.unlikeness(junk(rng, 300), gates) > 1).mean() < 0.05


def test_without_validation_halves_of_the_groups_set_the_limit():
    rng = np.random.default_rng(7)
    train = with_junk(rng, 300, 0.05)
    gates = image_gates.fit_gates(train, None, [f"microscope {index % 4}" for index in range(300)])
    assert (image_gates.unlikeness(junk(rng, 300), gates) > 1).mean() > 0.99
    assert (image_gates.unlikeness(scalps(rng, 3000), gates) > 1).mean() < 0.03
    assert image_gates.fit_gates(train, None, ["one microscope"] * 300).limit > 0


def test_without_images_there_are_no_gates():
    some = scalps(np.random.default_rng(0), 50)
    for train, val in ((some[:0], some), (some, some[:0]), (some[:0], None)):
        with pytest.raises(ValueError, match="gates need images"):
            image_gates.fit_gates(train, val)
