"""Weights and series for the forms of the recurrence, and a loss that sees all they give.

Shapes: as in medfuse_jax.models.ehr_encoder.
"""

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax.models import ehr_encoder

TOLERANCE = 2e-5


def case(num_steps, lengths, seed=0, num_inputs=5, width=4):
    rng = np.random.default_rng(seed)
    weights = {
        "input_kernel": rng.normal(size=(num_inputs, 4 * width)).astype(np.float32),
        "recurrent_kernel": rng.normal(size=(width, 4 * width)).astype(np.float32),
        "bias": rng.normal(size=4 * width).astype(np.float32),
    }
    x_BTF = rng.normal(size=(len(lengths), num_steps, num_inputs)).astype(np.float32)
    return weights, x_BTF, np.array(lengths, np.int32)


def plain(weights, x_BTF, length_B, dtype=jnp.float32):
    """What `lstm.lstm` gives, by the plain scan."""
    valid_BT = ehr_encoder.valid_steps(length_B, x_BTF.shape[1])
    hidden_BTD, last_BD = ehr_encoder.masked_lstm(weights, x_BTF, valid_BT, dtype)
    return jnp.where(valid_BT[..., None], hidden_BTD, 0), last_BD


def with_gradients(recurrence):
    """(weights, x, length) -> (a loss that sees every hidden state, the padding's too, and the last one; gradients)."""

    def loss(weights, x_BTF, length_B):
        hidden_BTD, last_BD = recurrence(weights, x_BTF, length_B)
        return jnp.sin(3 * hidden_BTD + jnp.arange(x_BTF.shape[1])[:, None]).sum() + jnp.cos(2 * last_BD).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def exact(*series):
        with jax.default_matmul_precision("highest"):  # a GPU rounds float32 to TF32 else
            return compiled(*series)

    return exact


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=TOLERANCE), a, b)


def poisoned(x_BTF, length_B):
    """The series with NaN past their ends."""
    return np.where(np.asarray(ehr_encoder.valid_steps(length_B, x_BTF.shape[1]))[..., None], x_BTF, np.nan)
