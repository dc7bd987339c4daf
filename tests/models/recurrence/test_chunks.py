"""The chunked LSTM against the plain scan: outputs and gradients across chunk borders, and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_cases import TOLERANCE, assert_close, case, plain, poisoned, with_gradients
from model_cases import equations

from medfuse_jax.models import ehr_encoder
from medfuse_jax.models.recurrence.chunks import CHUNK_STEPS

_CHUNKED, _PLAIN = with_gradients(ehr_encoder.lstm), with_gradients(plain)
_ON_CPU = with_gradients(functools.partial(ehr_encoder.lstm, ops="cpu"))


@pytest.mark.parametrize(
    ("num_steps", "lengths"),
    [
        (1, [1, 0]),
        (CHUNK_STEPS, [CHUNK_STEPS, CHUNK_STEPS - 1, 1]),
        (3 * CHUNK_STEPS - 3, [2 * CHUNK_STEPS, 5, 0, 2 * CHUNK_STEPS - 1]),  # the last chunk is not run
        (2 * CHUNK_STEPS + 5, [2 * CHUNK_STEPS + 5, 2 * CHUNK_STEPS + 4, CHUNK_STEPS + 1]),
    ],
)
def test_outputs_and_gradients_match_the_plain_scan(num_steps, lengths):
    series = case(num_steps, lengths)
    assert_close(_CHUNKED(*series), _PLAIN(*series))
    assert_close(_ON_CPU(*series), _PLAIN(*series))


def test_steps_are_unrolled_except_on_cpus():
    weights, x_BTF, length_B = case(2 * CHUNK_STEPS, [5, 2])
    unrolled = {}
    for ops in ("plain", "cpu"):
        fn = functools.partial(ehr_encoder.lstm, ops=ops)
        traced = jax.make_jaxpr(lambda w, fn=fn: fn(w, x_BTF, length_B))(weights)
        scans = [equation.params for equation in equations(traced) if equation.primitive.name == "scan"]
        unrolled[ops] = [scan["unroll"] for scan in scans]
    assert unrolled == {"plain": [CHUNK_STEPS], "cpu": [1]}


def test_one_missing_step_exceeds_the_tolerance():
    weights, x_BTF, length_B = case(20, [20, 9])
    (loss, _), (other, _) = _CHUNKED(weights, x_BTF, length_B), _CHUNKED(weights, x_BTF, length_B - 1)
    assert abs(loss - other) > 100 * TOLERANCE


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_padding_values_affect_neither_outputs_nor_gradients(value):
    weights, x_BTF, length_B = case(20, [17, 3, 0])
    clean, with_values = (_CHUNKED(weights, x, length_B) for x in (x_BTF, poisoned(x_BTF, length_B, value)))
    jax.tree.map(np.testing.assert_array_equal, clean, with_values)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(with_values))
    d_x_BTF = with_values[1][1]
    assert not np.any(d_x_BTF[1, 3:]) and not np.any(d_x_BTF[2]) and np.any(d_x_BTF[0, 0])


def test_a_longer_bucket_changes_nothing():
    weights, x_BTF, length_B = case(20, [20, 9])
    longer_BTF = np.pad(x_BTF, ((0, 0), (0, 100), (0, 0)))
    hidden_BTD, last_BD = ehr_encoder.lstm(weights, x_BTF, length_B)
    longer_BTD, longer_last_BD = ehr_encoder.lstm(weights, longer_BTF, length_B)
    np.testing.assert_array_equal(last_BD, longer_last_BD)
    np.testing.assert_array_equal(hidden_BTD, longer_BTD[:, :20])
    assert not np.any(longer_BTD[:, 20:])


def test_a_length_beyond_the_series_means_its_end():
    weights, x_BTF, _ = case(5, [5, 5])
    beyond, at_end = (_CHUNKED(weights, x_BTF, np.array([length, 5])) for length in (9, 5))
    jax.tree.map(np.testing.assert_array_equal, beyond, at_end)


@pytest.mark.slow
def test_vmap_over_trials_matches_each_trial_alone():
    cases = [case(20, [20, 9], seed=seed) for seed in (0, 1, 2)]
    x_BTF, length_B = cases[0][1:]
    gradient = jax.grad(lambda w: ehr_encoder.lstm(w, x_BTF, length_B)[1].sum())
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(weights for weights, _, _ in cases))
    together = jax.jit(jax.vmap(gradient))(stacked)
    for i, (weights, _, _) in enumerate(cases):
        alone = gradient(weights)
        jax.tree.map(lambda t, a, i=i: np.testing.assert_allclose(t[i], a, atol=TOLERANCE), together, alone)


def test_bfloat16_products_keep_a_float32_state():
    weights, x_BTF, length_B = case(40, [40, 17])
    exact_BD, rounded_BD = (ehr_encoder.lstm(weights, x_BTF, length_B, t)[1] for t in (jnp.float32, jnp.bfloat16))
    assert rounded_BD.dtype == jnp.float32
    assert 1e-6 < np.abs(exact_BD - rounded_BD).max() < 0.1
