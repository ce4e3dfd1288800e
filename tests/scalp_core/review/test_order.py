"""The order by expected gain: uncertain images that look different come first."""

import numpy as np
import pytest

from scalp_core.review.order import order_by_gain

UNSURE = [0.4, 0.35, 0.15, 0.1]
SURE = [0.999, 0.001, 0.0, 0.0]


def clustered(copies, looks=4, size=16):
    """Images of `looks` different looks, each with `copies` that are nearly equal."""
    draw = np.random.default_rng(0)
    centers = 10 * np.eye(looks, size)
    return np.repeat(centers, copies, axis=0) + 0.01 * draw.normal(size=(looks * copies, size))


def test_each_look_comes_before_a_copy():
    features = clustered(copies=10)
    order = order_by_gain(features, np.tile(UNSURE, (40, 1)))
    assert sorted(order) == list(range(40))
    assert {number // 10 for number in order[:4]} == {0, 1, 2, 3}
    assert (order_by_gain(features, np.tile(UNSURE, (40, 1))) == order).all()


def test_images_of_which_the_model_is_sure_come_last():
    features = clustered(copies=10)
    sure = np.arange(40) % 2 == 1
    order = order_by_gain(features, np.where(sure[:, None], SURE, UNSURE))
    assert {number // 10 for number in order[:4]} == {0, 1, 2, 3}
    assert not sure[order[:4]].any()


@pytest.mark.parametrize("images", [0, 1, 2, 5])
def test_few_and_equal_images_have_an_order(images):
    order = order_by_gain(np.ones((images, 3)), np.tile(UNSURE, (images, 1)))
    assert sorted(order) == list(range(images))
