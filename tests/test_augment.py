"""X-rays on the device: exact where nothing is drawn, right where something is, alike in any layout."""

import dataclasses

import jax
import numpy as np
import pytest

from medfuse_jax import augment
from medfuse_jax import config as config_lib

_OPTIONS = augment.ImageOptions(**config_lib.section("image", resize_px=64, crop_px=56))
_STILL = dataclasses.replace(_OPTIONS, flip=False, rotation_deg=0.0, scale=(1.0, 1.0), translation=0.0)


def _images(count=3, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)


def test_evaluation_takes_the_centre_and_a_channel_of_ones():
    images = _images()
    out = np.asarray(augment.prepare(images, _OPTIONS))
    assert out.shape == (3, 56, 56, 2)
    np.testing.assert_allclose(out[..., 0], images[:, 4:60, 4:60] / 255.0, atol=1e-6)
    assert (out[..., 1] == 1).all()


def test_resizing_keeps_the_mean_and_the_size():
    images = _images(size=256)
    options = augment.ImageOptions(**config_lib.section("image", resize_px=64, crop_px=64))
    out = np.asarray(augment.prepare(images, options))
    assert out.shape == (3, 64, 64, 2)
    np.testing.assert_allclose(out[..., 0].mean((1, 2)), images.mean((1, 2)) / 255, atol=2e-3)


def test_drawing_nothing_is_evaluation():
    images = _images()
    still = augment.prepare_augmented(jax.random.key(0), np.arange(3), images, _STILL)
    np.testing.assert_allclose(still, augment.prepare(images, _STILL), atol=1e-5)


def test_a_flip_mirrors_left_and_right():
    images = _images(count=16)
    options = dataclasses.replace(_STILL, flip=True)
    out = np.asarray(augment.prepare_augmented(jax.random.key(1), np.arange(16), images, options))[..., 0]
    plain = np.asarray(augment.prepare(images, _STILL))[..., 0]
    mirrored = np.isclose(out, plain[:, :, ::-1], atol=1e-4).all((1, 2))
    same = np.isclose(out, plain, atol=1e-4).all((1, 2))
    assert (mirrored ^ same).all() and 2 < mirrored.sum() < 14


def _centre_of_mass(image):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] - (image.shape[0] - 1) / 2
    return np.array([(image * y).sum(), (image * x).sum()]) / image.sum()


def _dot(y, x):
    image = np.zeros((1, 64, 64), np.uint8)
    image[0, 31 + y : 33 + y, 31 + x : 33 + x] = 255
    return image


def test_rotation_keeps_the_distance_and_stays_within_its_angle():
    options = dataclasses.replace(_STILL, rotation_deg=45.0)
    angles = []
    for i in range(30):
        out = np.asarray(augment.prepare_augmented(jax.random.key(2), np.array([i]), _dot(0, 16), options))[0, ..., 0]
        y, x = _centre_of_mass(out)
        assert np.hypot(y, x) == pytest.approx(16, abs=0.3)
        angles.append(np.degrees(np.arctan2(y, x)))
    assert np.abs(angles).max() <= 46 and min(angles) < -20 and max(angles) > 20


def test_scale_moves_a_point_out_or_in_by_that_factor():
    options = dataclasses.replace(_STILL, scale=(1.15, 1.15))
    out = np.asarray(augment.prepare_augmented(jax.random.key(3), np.array([0]), _dot(12, 0), options))[0, ..., 0]
    np.testing.assert_allclose(_centre_of_mass(out), [12 * 1.15, 0], atol=0.2)


def test_translation_stays_within_its_part_of_the_side():
    options = dataclasses.replace(_STILL, translation=0.15)
    centres = np.array(
        [
            _centre_of_mass(
                np.asarray(augment.prepare_augmented(jax.random.key(4), np.array([i]), _dot(0, 0), options))[0, ..., 0]
            )
            for i in range(30)
        ]
    )
    assert np.abs(centres).max() <= 0.15 * 64 + 0.1 and np.abs(centres).max(0).min() > 4


def test_a_random_crop_reaches_beyond_the_centre():
    options = dataclasses.replace(_STILL, crop="random", crop_px=32)
    centres = [
        _centre_of_mass(
            np.asarray(augment.prepare_augmented(jax.random.key(5), np.array([i]), _dot(0, 0), options))[0, ..., 0]
        )
        for i in range(20)
    ]
    assert 5 < np.abs(centres).max() <= 16.1


def test_a_image_is_augmented_alike_wherever_it_stands_in_the_batch():
    images = _images(count=4)
    key, ids = jax.random.key(6), np.array([3, 9, 12, 15])
    whole = np.asarray(augment.prepare_augmented(key, ids, images, _OPTIONS))
    halves = [augment.prepare_augmented(key, ids[h], images[h], _OPTIONS) for h in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-6)
    other = augment.prepare_augmented(key, ids + 1, images, _OPTIONS)
    assert np.abs(whole - np.asarray(other)).mean() > 0.05
