"""Augmentation: exact without randomness, within its ranges otherwise, and independent of the batch's layout."""

import dataclasses

import jax
import numpy as np
import pytest

from medfuse_jax import augment
from medfuse_jax import config as config_lib

_OPTIONS = augment.ImageOptions(**config_lib.section("image", resize_px=64, crop_px=56))
_FIXED = dataclasses.replace(_OPTIONS, flip=False, rotation_deg=0.0, scale=(1.0, 1.0), translation=0.0)
_augment = jax.jit(augment.prepare_augmented, static_argnums=(3, 4))


def _images(count=4, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)


def _grey(seed, images, options):
    """Return the grey channel of augmented images."""
    return np.asarray(_augment(jax.random.key(seed), np.arange(len(images)), images, options))[..., 0]


def test_evaluation_crops_the_centre_and_adds_a_channel_of_ones():
    images = _images()
    out = np.asarray(augment.prepare(images, _OPTIONS))
    assert out.shape == (4, 56, 56, 2)
    np.testing.assert_allclose(out[..., 0], images[:, 4:60, 4:60] / 255.0, atol=1e-6)
    assert (out[..., 1] == 1).all()


def test_resizing_keeps_the_mean():
    images = _images(size=256)
    out = np.asarray(augment.prepare(images, dataclasses.replace(_OPTIONS, crop_px=64)))
    assert out.shape == (4, 64, 64, 2)
    np.testing.assert_allclose(out[..., 0].mean((1, 2)), images.mean((1, 2)) / 255, atol=2e-3)


def test_augmentation_of_zero_size_equals_evaluation():
    images = _images()
    out = _augment(jax.random.key(0), np.arange(4), images, _FIXED)
    np.testing.assert_allclose(out, augment.prepare(images, _FIXED), atol=1e-5)


def test_a_flip_mirrors_left_and_right():
    images = _images(count=16)
    out = _grey(1, images, dataclasses.replace(_FIXED, flip=True))
    plain = np.asarray(augment.prepare(images, _FIXED))[..., 0]
    is_mirrored = np.isclose(out, plain[:, :, ::-1], atol=1e-4).all((1, 2))
    is_same = np.isclose(out, plain, atol=1e-4).all((1, 2))
    assert (is_mirrored ^ is_same).all() and 2 < is_mirrored.sum() < 14


def _centres(seed, y, x, options, count=30):
    """Return centres of mass [count, 2] of a dot at (y, x) from the centre, each augmented with another id."""
    images = np.zeros((count, 64, 64), np.uint8)
    images[:, 31 + y : 33 + y, 31 + x : 33 + x] = 255
    out = _grey(seed, images, options)
    position = np.arange(out.shape[1]) - (out.shape[1] - 1) / 2
    total = out.sum((1, 2))
    return np.stack([out.sum(2) @ position / total, out.sum(1) @ position / total], 1)


def test_rotation_keeps_the_distance_and_its_range():
    centres = _centres(2, 0, 16, dataclasses.replace(_FIXED, rotation_deg=45.0))
    np.testing.assert_allclose(np.hypot(*centres.T), 16, atol=0.3)
    angles = np.degrees(np.arctan2(*centres.T))
    assert np.abs(angles).max() <= 46 and angles.min() < -20 and angles.max() > 20


def test_scale_moves_a_point_by_its_factor():
    (centre,) = _centres(3, 12, 0, dataclasses.replace(_FIXED, scale=(1.15, 1.15)), count=1)
    np.testing.assert_allclose(centre, [12 * 1.15, 0], atol=0.2)


def test_translation_keeps_its_range():
    centres = np.abs(_centres(4, 0, 0, dataclasses.replace(_FIXED, translation=0.15)))
    assert centres.max() <= 0.15 * 64 + 0.1 and centres.max(0).min() > 4


def test_a_random_crop_leaves_the_centre():
    centres = _centres(5, 0, 0, dataclasses.replace(_FIXED, crop="random", crop_px=32), count=20)
    assert 5 < np.abs(centres).max() <= 16.1


def test_augmentation_does_not_depend_on_the_place_in_the_batch():
    images = _images()
    ids = np.array([3, 9, 12, 15])
    whole = np.asarray(_augment(jax.random.key(6), ids, images, _OPTIONS))
    back = np.asarray(_augment(jax.random.key(6), ids[::-1], images[::-1], _OPTIONS))
    np.testing.assert_allclose(whole, back[::-1], atol=1e-6)
    half = _augment(jax.random.key(6), ids[2:], images[2:], _OPTIONS)
    np.testing.assert_allclose(whole[2:], half, atol=1e-6)
    other = _augment(jax.random.key(6), ids + 1, images, _OPTIONS)
    assert np.abs(whole - np.asarray(other)).mean() > 0.05


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rotation_deg": 180.0, "crop": "random"},
        {"crop_px": 50, "rotation_deg": 10.0},  # not a multiple of the tile
        {"scale": (0.1, 0.1)},  # a tile covers the whole X-ray
        {"scale": (10.0, 10.0), "rotation_deg": 0.0},
        {"translation": 1.0},  # most pixels outside
        {"resize_px": 48, "crop_px": 40},
    ],
)
def test_products_sample_as_gathers_do(changed):
    images, options = _images(count=6), dataclasses.replace(_OPTIONS, **changed)
    args = (jax.random.key(7), np.arange(6), images, options)
    gathered, multiplied = np.asarray(_augment(*args, "plain")), np.asarray(_augment(*args, "tpu"))
    np.testing.assert_allclose(multiplied, gathered, atol=1e-4)
    nearby = np.asarray(_augment(jax.random.key(8), *args[1:], "tpu"))
    assert np.abs(nearby - gathered).max() > 0.1
