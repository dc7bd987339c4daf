"""The chunked recurrence against the plain scan: outputs and gradients, across chunk borders, deaf to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_cases import TOLERANCE, assert_close, case, plain, poisoned, with_gradients

from medfuse_jax.models import ehr_encoder
from medfuse_jax.models.recurrence import chunks

_CHUNK, _SMALL = chunks.CHUNK_STEPS
_FAST, _PLAIN = with_gradients(ehr_encoder.lstm), with_gradients(plain)


@pytest.mark.parametrize(
    ("num_steps", "lengths"),
    [
        (1, [1, 0]),
        (_CHUNK, [_CHUNK, _CHUNK - 1, 1]),
        (_CHUNK + 1, [_CHUNK + 1, _CHUNK, 2]),
        (3 * _CHUNK - 3, [2 * _CHUNK, 5, 0, 2 * _CHUNK - 1]),  # the last chunk is not run
        (3 * _CHUNK, [_CHUNK + _SMALL, 2 * _SMALL, 1]),  # a large chunk and one small one
        (2 * _CHUNK, [_CHUNK + 2 * _SMALL + 1, _CHUNK + 1]),
        (2 * _CHUNK + 5, [2 * _CHUNK + 5, 2 * _CHUNK + 4, 17]),
    ],
)
def test_outputs_and_gradients_are_those_of_the_plain_scan(num_steps, lengths):
    series = case(num_steps, lengths)
    assert_close(_FAST(*series), _PLAIN(*series))


def test_the_tolerance_would_show_a_step_too_few():
    weights, x_BTF, length_B = case(20, [20, 9])
    (loss, _), (other, _) = _FAST(weights, x_BTF, length_B), _FAST(weights, x_BTF, length_B - 1)
    assert abs(loss - other) > 100 * TOLERANCE


def test_padding_reaches_neither_outputs_nor_gradients():
    weights, x_BTF, length_B = case(40, [37, 3, 0])
    nans_BTF = poisoned(x_BTF, length_B)
    jax.tree.map(np.testing.assert_array_equal, _FAST(weights, x_BTF, length_B), _FAST(weights, nans_BTF, length_B))


def test_a_longer_bucket_changes_nothing():
    weights, x_BTF, length_B = case(20, [20, 9])
    longer_BTF = np.pad(x_BTF, ((0, 0), (0, 100), (0, 0)))
    (hidden_BTD, last_BD), (longer_BTD, longer_last_BD) = (
        ehr_encoder.lstm(weights, x, length_B) for x in (x_BTF, longer_BTF)
    )
    np.testing.assert_array_equal(last_BD, longer_last_BD)
    np.testing.assert_array_equal(hidden_BTD, longer_BTD[:, :20])
    assert not np.any(longer_BTD[:, 20:])


def test_a_length_beyond_the_series_is_its_end():
    weights, x_BTF, _ = case(5, [5, 5])
    jax.tree.map(
        np.testing.assert_array_equal, _FAST(weights, x_BTF, np.array([9, 5])), _FAST(weights, x_BTF, np.array([5, 5]))
    )


@pytest.mark.slow
def test_several_trials_at_once_are_the_trials_one_by_one():
    cases = [case(20, [20, 9], seed=seed) for seed in (0, 1, 2)]
    x_BTF, length_B = cases[0][1:]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(weights for weights, _, _ in cases))
    together = jax.jit(jax.vmap(jax.grad(lambda w: ehr_encoder.lstm(w, x_BTF, length_B)[1].sum())))(stacked)
    for i, (weights, _, _) in enumerate(cases):
        alone = jax.grad(lambda w: ehr_encoder.lstm(w, x_BTF, length_B)[1].sum())(weights)
        jax.tree.map(lambda t, a, i=i: np.testing.assert_allclose(t[i], a, atol=TOLERANCE), together, alone)


def test_bfloat16_products_stay_near_float32():
    weights, x_BTF, length_B = case(40, [40, 17])
    exact_BD, rounded_BD = (
        ehr_encoder.lstm(weights, x_BTF, length_B, dtype)[1] for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded_BD.dtype == jnp.float32
    assert 1e-6 < np.abs(exact_BD - rounded_BD).max() < 0.1
