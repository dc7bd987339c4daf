"""X-rays and rows: listed, dense, empty slots."""

import numpy as np

from medfuse_jax.models.presence import images_of


def _listed(image_row, image_mask=None, num_rows: int = 4):
    image_PHW = np.ones((len(image_row), 2, 2), np.float32)
    return images_of(image_PHW, num_rows, image_row=np.array(image_row), image_mask=image_mask)


def test_values_go_to_their_rows_and_back():
    images = _listed([2, 0])
    x_PE = np.array([[1, 2], [3, 4]], np.float32)
    x_BE = images.to_rows(x_PE)
    np.testing.assert_array_equal(x_BE, [[3, 4], [0, 0], [1, 2], [0, 0]])
    np.testing.assert_array_equal(images.from_rows(x_BE), x_PE)
    np.testing.assert_array_equal(images.present_rows(), [True, False, True, False])


def test_an_empty_slot_is_dropped_by_its_row_or_by_its_mask():
    x_P1 = np.array([[1], [2], [3]], np.float32)
    for images in (_listed([1, 4, 4]), _listed([1, 1, 3], np.array([True, False, False]))):
        np.testing.assert_array_equal(images.valid_P, [True, False, False])
        np.testing.assert_array_equal(images.to_rows(x_P1), [[0], [1], [0], [0]])
        np.testing.assert_array_equal(images.from_rows(np.full((4, 1), 5, np.float32)), [[5], [0], [0]])
        np.testing.assert_array_equal(images.image_PHWC[:, 0, 0, 0], [1, 0, 0])


def test_dense_images_belong_to_the_row_of_their_place():
    image_BHWC = np.full((3, 2, 2, 2), np.nan, np.float32)
    image_BHWC[0] = 1
    images = images_of(image_BHWC, 3, has_cxr=np.array([True, False, False]))
    x_BE = np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(images.to_rows(x_BE), [[1], [0], [0]])
    np.testing.assert_array_equal(images.from_rows(x_BE), [[1], [0], [0]])
    assert images.image_PHWC.shape == (3, 2, 2, 2) and np.isfinite(images.image_PHWC).all()
    np.testing.assert_array_equal(images_of(image_BHWC, 3).present_rows(), [True] * 3)


def test_no_image_and_no_slot_are_no_images():
    assert images_of(None, 3) is None
    assert images_of(np.zeros((0, 2, 2)), 3, image_row=np.zeros(0, int)) is None
