"""X-rays and rows: listed, dense, empty slots."""

import numpy as np

from medfuse_jax.models.presence import images_of


def _listed(image_row, image_mask=None, num_rows: int = 4):
    image_PHW = np.ones((len(image_row), 2, 2), np.float32)
    return images_of(num_rows, image_PHW, image_row=np.array(image_row), image_mask=image_mask)


def test_values_go_to_their_rows_and_back():
    images = _listed([2, 0])
    x_PE = np.array([[1, 2], [3, 4]], np.float32)
    x_BE = images.to_rows(x_PE)
    np.testing.assert_array_equal(x_BE, [[3, 4], [0, 0], [1, 2], [0, 0]])
    np.testing.assert_array_equal(images.from_rows(x_BE), x_PE)
    np.testing.assert_array_equal(images.present_rows(), [True, False, True, False])


def test_an_empty_slot_is_dropped():
    x_P1 = np.array([[1], [2], [3]], np.float32)
    images = _listed([1, 1, 3], np.array([True, False, False]))
    np.testing.assert_array_equal(images.valid_P, [True, False, False])
    np.testing.assert_array_equal(images.to_rows(x_P1), [[0], [1], [0], [0]])
    np.testing.assert_array_equal(images.from_rows(np.full((4, 1), 5, np.float32)), [[5], [0], [0]])
    np.testing.assert_array_equal(images.image_PHWC[:, 0, 0, 0], [1, 0, 0])


def test_features_take_the_place_of_an_image():
    features_PE = np.array([[1, 2], [np.nan, 4]], np.float32)
    images = images_of(3, features=features_PE, image_row=np.array([2, 0]), image_mask=np.array([True, False]))
    np.testing.assert_array_equal(images.features_PE, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(images.present_rows(), [False, False, True])


def test_dense_images_belong_to_the_row_of_their_place():
    image_BHWC = np.full((3, 2, 2, 2), np.nan, np.float32)
    image_BHWC[0] = 1
    images = images_of(3, image_BHWC, has_cxr=np.array([True, False, False]))
    x_BE = np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(images.to_rows(x_BE), [[1], [0], [0]])
    np.testing.assert_array_equal(images.from_rows(x_BE), [[1], [0], [0]])
    assert images.image_PHWC.shape == (3, 2, 2, 2) and np.isfinite(images.image_PHWC).all()
    np.testing.assert_array_equal(images_of(3, image_BHWC).present_rows(), [True] * 3)


def test_without_images_or_slots_there_are_no_images():
    assert images_of(3, None) is None
    assert images_of(3, np.zeros((0, 2, 2)), image_row=np.zeros(0, int)) is None
