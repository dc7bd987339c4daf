"""The recurrence by cuDNN, as jax calls it (`jax.experimental.rnn`): on CUDA alone.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates.

Its products are float32's, or TF32's where jax's default precision allows it: never bfloat16's. It runs over each
series' own length, of which it makes a copy on the host, so that a step waits for the one before. It has no vmap.
"""

import jax.numpy as jnp
from jax.experimental import rnn

from medfuse_jax.models.recurrence.cell import valid_steps


def cudnn_lstm(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype):
    """As `chunked_lstm`. dtype: not asked for; see above."""
    del dtype
    num_rows, num_steps, num_inputs = x_BTF.shape
    width = len(recurrent_kernel_DG)
    # cuDNN's order: both kernels as [G, inputs], then two biases, of which one is ours. Its gates are in our order.
    of_kernels = [kernel.T.reshape(-1) for kernel in (input_kernel_FG, recurrent_kernel_DG)]
    weights = jnp.concatenate([*of_kernels, bias_G, jnp.zeros_like(bias_G)])
    valid_BT1 = valid_steps(length_B, num_steps)[..., None]
    x_BTF = jnp.where(valid_BT1, x_BTF, 0).astype(jnp.float32)
    zeros_1BD = jnp.zeros((1, num_rows, width), jnp.float32)
    # It refuses a series of no steps: that one runs a step of zeros, which is masked.
    run_B = jnp.maximum(length_B, 1).astype(jnp.int32)
    sizes = (num_inputs, width, 1, 0.0, False)  # one layer, no dropout, one direction
    hidden_BTD, last_1BD, _ = rnn.lstm(x_BTF, zeros_1BD, zeros_1BD, weights, run_B, *sizes)
    return jnp.where(valid_BT1, hidden_BTD, 0), jnp.where(length_B[:, None] > 0, last_1BD[0], 0)
