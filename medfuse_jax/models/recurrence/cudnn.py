"""The LSTM by cuDNN, through `jax.experimental.rnn`; CUDA only.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates.

Products are in float32, or TF32 if jax's default precision allows it, never in bfloat16. cuDNN runs each series to its
own length and copies the lengths to the host, so a step waits for the previous one. vmap is not supported.
"""

import jax.numpy as jnp
from jax.experimental import rnn

from medfuse_jax.models.recurrence.cell import valid_time_steps


def cudnn_lstm(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype):
    """Run an LSTM like `chunked_lstm`. dtype: ignored (see the module's docstring)."""
    del dtype
    num_rows, num_time_steps, num_inputs = x_BTF.shape
    width = len(recurrent_kernel_DG)
    # cuDNN's layout: both kernels as [G, inputs], then two biases, the second zero. Its gate order is the same as ours.
    kernels = [kernel.T.reshape(-1) for kernel in (input_kernel_FG, recurrent_kernel_DG)]
    weights = jnp.concatenate([*kernels, bias_G, jnp.zeros_like(bias_G)])
    valid_BT1 = valid_time_steps(length_B, num_time_steps)[..., None]
    x_BTF = jnp.where(valid_BT1, x_BTF, 0).astype(jnp.float32)
    zeros_1BD = jnp.zeros((1, num_rows, width), jnp.float32)
    # cuDNN rejects empty series: run one step of zeros, and mask it.
    length_run_B = jnp.maximum(length_B, 1).astype(jnp.int32)
    sizes = (num_inputs, width, 1, 0.0, False)  # one layer, no dropout, one direction
    hidden_BTD, last_1BD, _ = rnn.lstm(x_BTF, zeros_1BD, zeros_1BD, weights, length_run_B, *sizes)
    return jnp.where(valid_BT1, hidden_BTD, 0), jnp.where(length_B[:, None] > 0, last_1BD[0], 0)
