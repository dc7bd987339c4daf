"""One step of an LSTM and its gradient, as the chunks and the Pallas kernels compute it; and which steps there are.

The plain scan (`lstm.masked_lstm`) has its own: it is what these are tested against. Arrays [..., D] of any number of
rows and units; gates in the order i, f, g, o.
"""

import jax
import jax.numpy as jnp

NUM_GATES = 4


def valid_steps(length_B: jax.Array, num_steps: int) -> jax.Array:
    """bool [B, T]: which steps lie inside each series."""
    return jnp.arange(num_steps) < length_B[:, None]


def forward(gates: tuple, cell_before: jax.Array) -> tuple[tuple, jax.Array, jax.Array]:
    """(activated gates, cell, hidden state) after a step; gates: the four sums before their activation."""
    i, f, g, o = gates
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    cell = f * cell_before + i * g
    return (i, f, g, o), cell, o * jnp.tanh(cell)


def backward(activated: tuple, cell_before, cell, d_hidden, d_cell) -> tuple[tuple, jax.Array]:
    """(gradients of the four sums, of the cell before) from those of the step's hidden state and cell."""
    i, f, g, o = activated
    tanh_cell = jnp.tanh(cell)
    d_cell = d_cell + d_hidden * o * (1 - tanh_cell**2)
    d_i = d_cell * g * i * (1 - i)
    d_f = d_cell * cell_before * f * (1 - f)
    d_g = d_cell * i * (1 - g**2)
    d_o = d_hidden * tanh_cell * o * (1 - o)
    return (d_i, d_f, d_g, d_o), d_cell * f
