"""The transformer over packed tokens of images equals one over each row's whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import fast_jit

from medfuse_jax.models import transformer
from medfuse_jax.models.presence import images_of

_B, _S, _N, _D = 4, 5, 3, 8
_RNG = np.random.default_rng(0)
_ROW_BSD = _RNG.normal(size=(_B, _S, _D)).astype(np.float32)
_IMAGE_PND = _RNG.normal(size=(3, _N, _D)).astype(np.float32)  # of rows 2 and 0; the last slot is empty
_MASK_BS = np.arange(_S) < np.array([5, 2, 0, 1])[:, None]
_LISTED = {"image_row": np.array([2, 0, 0]), "image_mask": np.array([True, True, False])}


def _images():
    return images_of(_B, features=jnp.zeros((3, 1)), **_LISTED)


@pytest.fixture(scope="module")
def layer():
    """A layer with its variables, as (row tokens, image tokens or None, mask) -> next tokens."""
    module = transformer.Layer(hidden=16)
    variables = module.init(jax.random.key(0), _ROW_BSD, _MASK_BS, None, None)
    packed = fast_jit(lambda row, image, mask: module.apply(variables, row, mask, image, _images()))
    plain = fast_jit(lambda row, mask: module.apply(variables, row, mask, None, None)[0])
    return packed, plain


def test_positions_are_sines_and_cosines():
    found = transformer.positions(6, 4)
    expected = [np.sin(5), np.sin(5 / 100), np.cos(5), np.cos(5 / 100)]
    np.testing.assert_allclose(found[5], expected, atol=1e-6)
    assert transformer.positions(6, 3).shape == (6, 3) and transformer.positions(2, 0).shape == (2, 0)
    grid = np.asarray(transformer.grid_positions(2, 3, 8))
    assert len(np.unique(grid.round(4), axis=0)) == 6  # every cell has its own
    np.testing.assert_array_equal(grid[0, :4], grid[2, :4])  # of one row


@pytest.mark.parametrize("width", [1, 6, 8])
def test_attention_is_a_weighted_mean_by_heads(width):
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(2, n, width)).astype(np.float32) for n in (2, 3, 3))
    mask = np.array([[True, True, False], [False, False, False]])
    found = transformer.attend(query, key, value, mask)
    heads = transformer.num_heads(width)
    assert heads == {1: 1, 6: 2, 8: 4}[width]
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        score = query[0, :, part] @ key[0, :2, part].T / np.sqrt(width // heads)
        weight = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found[0, :, part], weight @ value[0, :2, part], atol=1e-6)
    assert not np.any(found[1])  # nothing to read


def test_packed_images_give_the_same_as_whole_sequences(layer):
    packed, plain = layer
    row_BSD, image_PND = packed(_ROW_BSD, _IMAGE_PND, _MASK_BS)
    of_row = {2: 0, 0: 1}
    whole_BCD = np.stack([np.concatenate([_ROW_BSD[b], _IMAGE_PND[of_row.get(b, 2)]]) for b in range(_B)])
    mask_BC = np.concatenate([_MASK_BS, np.repeat([[True], [False], [True], [False]], _N, axis=1)], axis=1)
    expected_BCD = plain(whole_BCD, mask_BC)
    np.testing.assert_allclose(row_BSD, expected_BCD[:, :_S], atol=1e-5)
    for row, slot in of_row.items():
        np.testing.assert_allclose(image_PND[slot], expected_BCD[row, _S:], atol=1e-5)
    assert np.abs(image_PND[0] - expected_BCD[0, _S:]).max() > 1e-2  # the other row's image would show


def test_the_first_token_alone_is_that_of_the_whole_layer():
    module = transformer.Layer(hidden=16)
    variables = module.init(jax.random.key(0), _ROW_BSD, _MASK_BS, None, None)
    for image_PND, images in ((_IMAGE_PND, _images()), (None, None)):
        whole_BSD, first_B1D = (
            module.apply(variables, _ROW_BSD, _MASK_BS, image_PND, images, only)[0] for only in (False, True)
        )
        np.testing.assert_allclose(first_B1D, whole_BSD[:, :1], atol=1e-6)


def test_an_empty_slot_and_masked_tokens_change_nothing(layer):
    packed, _ = layer
    other_PND, other_BSD = _IMAGE_PND.copy(), np.where(_MASK_BS[..., None], _ROW_BSD, 50.0).astype(np.float32)
    other_PND[2] = 50.0
    before, after = packed(_ROW_BSD, _IMAGE_PND, _MASK_BS), packed(other_BSD, other_PND, _MASK_BS)
    np.testing.assert_array_equal(before[0][_MASK_BS], after[0][_MASK_BS])
    np.testing.assert_array_equal(before[1][:2], after[1][:2])
    changed_PND = _IMAGE_PND.copy()
    changed_PND[0, 0] += 1  # the image of row 2, which has no other token, changes its row's and no other's
    moved_B = np.abs(packed(_ROW_BSD, changed_PND, _MASK_BS)[0] - before[0]).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(moved_B, [False, False, True, False])
