"""One time step of an LSTM and its gradient, for the kernels of chunks.py and pallas.py.

The plain scan (`scan.masked_lstm`) has its own copy, since it is their reference. Arrays are [..., D] for any number of
rows and units; gates are in the order i, f, g, o.
"""

import jax
import jax.numpy as jnp

NUM_GATES = 4


def valid_time_steps(length_B: jax.Array, num_time_steps: int) -> jax.Array:
    """Return the mask of the time steps within each series, bool [B, T]."""
    return jnp.arange(num_time_steps) < length_B[:, None]


def forward(gates: tuple, cell_before: jax.Array) -> tuple[tuple, jax.Array, jax.Array]:
    """Return (activated gates, cell, hidden state) after a time step; gates: the four pre-activations."""
    i, f, g, o = gates
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    cell = f * cell_before + i * g
    return (i, f, g, o), cell, o * jnp.tanh(cell)


def backward(activated: tuple, cell_before, cell, d_hidden, d_cell) -> tuple[tuple, jax.Array]:
    """Return the gradients of (the four pre-activations, the previous cell), given those of hidden state and cell."""
    i, f, g, o = activated
    tanh_cell = jnp.tanh(cell)
    d_cell = d_cell + d_hidden * o * (1 - tanh_cell**2)
    d_i = d_cell * g * i * (1 - i)
    d_f = d_cell * cell_before * f * (1 - f)
    d_g = d_cell * i * (1 - g**2)
    d_o = d_hidden * tanh_cell * o * (1 - o)
    return (d_i, d_f, d_g, d_o), d_cell * f
