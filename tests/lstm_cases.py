"""Weights and series for the LSTM kernels, and a loss that depends on every output.

Shapes: as in medfuse_jax.models.ehr_encoder.
"""

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax.models.recurrence import scan
from medfuse_jax.models.recurrence.cell import valid_time_steps

TOLERANCE = 2e-5


def case(num_steps, lengths, seed=0, num_inputs=5, width=4):
    """Return (weights, series [B, T, F], lengths [B])."""
    rng = np.random.default_rng(seed)
    weights = {
        "input_kernel": rng.normal(size=(num_inputs, 4 * width)).astype(np.float32),
        "recurrent_kernel": rng.normal(size=(width, 4 * width)).astype(np.float32),
        "bias": rng.normal(size=4 * width).astype(np.float32),
    }
    x_BTF = rng.normal(size=(len(lengths), num_steps, num_inputs)).astype(np.float32)
    return weights, x_BTF, np.array(lengths, np.int32)


def plain(weights, x_BTF, length_B, dtype=jnp.float32):
    """Return what `ehr_encoder.lstm` returns, by the plain scan."""
    valid_BT = valid_time_steps(length_B, x_BTF.shape[1])
    hidden_BTD, last_BD = scan.masked_lstm(weights, x_BTF, valid_BT, dtype)
    return jnp.where(valid_BT[..., None], hidden_BTD, 0), last_BD


def with_gradients(recurrence):
    """Return fn(weights, x, length) -> (loss, gradients); the loss sees every hidden state, padding included."""

    def loss(weights, x_BTF, length_B):
        hidden_BTD, last_BD = recurrence(weights, x_BTF, length_B)
        return jnp.sin(3 * hidden_BTD + jnp.arange(x_BTF.shape[1])[:, None]).sum() + jnp.cos(2 * last_BD).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def exact(*series):
        with jax.default_matmul_precision("highest"):  # otherwise a GPU rounds float32 to TF32
            return compiled(*series)

    return exact


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=TOLERANCE), a, b)


def poisoned(x_BTF, length_B, value=np.nan):
    """Return the series with `value` in the padding."""
    return np.where(np.asarray(valid_time_steps(length_B, x_BTF.shape[1]))[..., None], x_BTF, value).astype(np.float32)


def assert_padding_is_zero(hidden_BTD, length_B):
    valid_BT1 = np.asarray(valid_time_steps(length_B, hidden_BTD.shape[1]))[..., None]
    assert not np.any(np.where(valid_BT1, 0, hidden_BTD))
