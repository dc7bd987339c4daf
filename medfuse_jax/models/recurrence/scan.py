"""The LSTM as a plain masked scan: the reference for every LSTM kernel, and the fusion of a few tokens.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates in the order i, f, g, o.
"""

import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence.cell import NUM_GATES, valid_time_steps

_FEW_STEPS = 4  # the fusion's tokens: a loop over them would be launched step by step


def masked_lstm(weights: dict, x_BTF: jax.Array, valid_BT: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Run an LSTM over the valid time steps, in any pattern. An invalid one leaves the state unchanged.

    Returns the hidden states [B, T, D], repeated at invalid time steps, and the last one [B, D].
    """
    clean_BTF = jnp.where(valid_BT[..., None], x_BTF, 0).astype(dtype)
    # One input product for all time steps, time first: the scan computes only the recurrent product.
    gates_TBG = jnp.einsum("btf,fg->tbg", clean_BTF, weights["input_kernel"].astype(dtype))
    gates_TBG = gates_TBG.astype(jnp.float32) + weights["bias"]
    recurrent_DG = weights["recurrent_kernel"].astype(dtype)

    def step(state, inputs):
        hidden_BD, cell_BD = state
        gates_BG, valid_B = inputs
        gates_BG = gates_BG + (hidden_BD.astype(dtype) @ recurrent_DG).astype(jnp.float32)
        i_BD, f_BD, g_BD, o_BD = jnp.split(gates_BG, NUM_GATES, axis=-1)
        next_cell_BD = jax.nn.sigmoid(f_BD) * cell_BD + jax.nn.sigmoid(i_BD) * jnp.tanh(g_BD)
        next_hidden_BD = jax.nn.sigmoid(o_BD) * jnp.tanh(next_cell_BD)
        hidden_BD = jnp.where(valid_B[:, None], next_hidden_BD, hidden_BD)
        cell_BD = jnp.where(valid_B[:, None], next_cell_BD, cell_BD)
        return (hidden_BD, cell_BD), hidden_BD

    zeros_BD = jnp.zeros((x_BTF.shape[0], recurrent_DG.shape[0]), jnp.float32)
    unroll = len(gates_TBG) if len(gates_TBG) <= _FEW_STEPS else 1
    (last_BD, _), hidden_TBD = jax.lax.scan(step, (zeros_BD, zeros_BD), (gates_TBG, valid_BT.T), unroll=unroll)
    return hidden_TBD.swapaxes(0, 1), last_BD


def mean_over_time(hidden_BTD: jax.Array, length_B: jax.Array) -> jax.Array:
    """Return the mean over the valid time steps [B, D]; zeros for a length of 0."""
    valid_BT1 = valid_time_steps(length_B, hidden_BTD.shape[1])[..., None]
    total_BD = jnp.sum(jnp.where(valid_BT1, hidden_BTD, 0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(valid_BT1, axis=1), 1)
