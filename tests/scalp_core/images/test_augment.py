import numpy as np

from scalp_core.images.augment import NUM_SYMMETRIES, apply_dihedral, crop_squares, degrade


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


def test_a_random_square_keeps_the_shape_and_is_no_smaller_than_the_limit():
    images = np.zeros((3, 64, 64, 3), np.uint8)
    images[:, 22:42, 27:37] = 255  # 20 high, 10 wide
    draws = np.array([[-1, 0, 0], [1, 0, 0], [1, 1, 1]])  # the whole image; the smallest square in two places
    whole, center, corner = crop_squares(images, 0.64, draws)[:, :, :, 0].astype(float) / 255
    assert (whole == images[0, :, :, 0] / 255).all()
    for cropped in (center, corner):  # sides are 1 / 0.8 times as long
        np.testing.assert_allclose((cropped.sum(0).max(), cropped.sum(1).max()), (25, 12.5), atol=0.5)
    assert np.argwhere(corner).mean() < np.argwhere(center).mean() - 5
    assert crop_squares(images, 1.0, draws) is images


def test_blur_and_compression_change_half_of_the_images_mildly():
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    draws = np.array([[-0.5, -0.5], [1, -1], [-1, 1], [0.01, 0.01]])
    same, blurred, compressed, hardly = degrade(images, 1.0, 60, draws)
    assert (same == images[0]).all()
    assert blurred.std() < images[1].std() / 2
    assert 0 < np.abs(compressed.astype(int) - images[2]).mean() < 40
    assert np.abs(hardly.astype(int) - images[3]).mean() < 20
    assert degrade(images, 0.0, 100, draws) is images
