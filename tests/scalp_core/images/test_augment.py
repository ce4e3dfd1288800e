import numpy as np

from scalp_core.images.augment import NUM_SYMMETRIES, apply_dihedral


def test_the_eight_symmetries_are_distinct_and_keep_every_pixel():
    image = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(1, 5, 5, 3)
    turned = apply_dihedral(image.repeat(NUM_SYMMETRIES, 0), np.arange(NUM_SYMMETRIES))
    assert len({one.tobytes() for one in turned}) == NUM_SYMMETRIES
    for one in turned:
        assert sorted(one.ravel()) == sorted(image.ravel())
    np.testing.assert_array_equal(turned[0], image[0])


def test_each_photograph_is_turned_by_its_own_symmetry():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 8, 8, 3)).astype(np.uint8)
    symmetry = rng.integers(0, NUM_SYMMETRIES, 20)
    together = apply_dihedral(images, symmetry)
    for index in range(20):
        np.testing.assert_array_equal(
            together[index], apply_dihedral(images[index : index + 1], symmetry[index : index + 1])[0]
        )
