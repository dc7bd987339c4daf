"""The LSTM in chunks of time steps, up to the batch's longest series. This kernel runs on any device.

Shapes: B batch, T time, C time steps per chunk, F input channel, D LSTM width, G = 4 D gates (i, f, g, o).

Compared with the plain scan (`scan.masked_lstm`, its reference):
- The loop stops at the batch's longest length, not at T. Padding to a bucket costs memory but no time, so a few
  buckets, each one compilation, serve stays of any length.
- Each chunk needs one matrix product for its inputs and one for each kernel's gradient. Autodiff of a scan would
  accumulate these gradients step by step.
- A chunk's time steps are unrolled: XLA makes each chunk one CUDA graph, and schedules it as a whole for a TPU.
"""

import functools

import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence import cell

CHUNK_STEPS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def chunked_lstm(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, unroll=True):
    """Return the hidden states [B, T, D] (zeros past a series' end) and the last one [B, D] (zeros for a length of 0).

    Kernels and bias are float32, x any float, length int [B]. dtype: of the products, which accumulate in float32; the
    state is float32. Values in the padding, NaN included, affect neither outputs nor gradients. unroll: whether to
    unroll a chunk's time steps; on a CPU that only costs compile time.
    """
    return _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, unroll)[0]


def _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, unroll):
    x_TBF, valid_TB = _pad_to_chunks(x_BTF, length_B, dtype)
    num_time_steps, num_rows, _ = x_TBF.shape
    width = recurrent_kernel_DG.shape[0]
    input_FG, recurrent_DG = input_kernel_FG.astype(dtype), recurrent_kernel_DG.astype(dtype)

    def step(state, inputs):
        hidden_BD, cell_BD = state
        product_BG, valid_B = inputs
        gates_BG = product_BG + _dot(hidden_BD.astype(dtype), recurrent_DG)
        activated, next_cell_BD, next_hidden_BD = cell.forward(_gates(gates_BG), cell_BD)
        hidden_BD = jnp.where(valid_B[:, None], next_hidden_BD, hidden_BD)
        cell_BD = jnp.where(valid_B[:, None], next_cell_BD, cell_BD)
        return (hidden_BD, cell_BD), (hidden_BD, cell_BD, jnp.concatenate(activated, axis=-1))

    def chunk(k, carry):
        state, hidden_TBD, cell_TBD, act_TBG = carry
        start = k * CHUNK_STEPS
        product_CBG = _dot(_chunk_at(x_TBF, start), input_FG) + bias_G
        state, (hidden_CBD, cell_CBD, act_CBG) = jax.lax.scan(
            step, state, (product_CBG, _chunk_at(valid_TB, start)), unroll=unroll
        )
        # Row t holds the state before time step t, which the backward pass reads.
        hidden_TBD = _put(hidden_TBD, hidden_CBD, start + 1)
        cell_TBD = _put(cell_TBD, cell_CBD, start + 1)
        return state, hidden_TBD, cell_TBD, _put(act_TBG, act_CBG.astype(dtype), start)

    zeros_BD = jnp.zeros((num_rows, width), jnp.float32)
    zeros_TBD = jnp.zeros((num_time_steps + 1, num_rows, width), jnp.float32)
    carry = ((zeros_BD, zeros_BD), zeros_TBD, zeros_TBD, jnp.zeros((num_time_steps, num_rows, 4 * width), dtype))
    num_chunks = time_steps_run(jnp.max(length_B)) // CHUNK_STEPS
    (last_BD, _), hidden_TBD, cell_TBD, act_TBG = jax.lax.fori_loop(0, num_chunks, chunk, carry)
    output_TBD = jnp.where(valid_TB[..., None], hidden_TBD[1:], 0)[: x_BTF.shape[1]]
    saved = (input_kernel_FG, recurrent_kernel_DG, x_TBF, valid_TB, num_chunks, hidden_TBD, cell_TBD, act_TBG)
    return (output_TBD.swapaxes(0, 1), last_BD), saved


def _save(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, unroll):
    outputs, saved = _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, unroll)
    return outputs, (saved, jnp.zeros((0, x_BTF.shape[1]), x_BTF.dtype))  # the empty array carries x's type and T


def _backward(dtype, unroll, residuals, cotangents):
    saved, like_0T = residuals
    input_kernel_FG, recurrent_kernel_DG, x_TBF, valid_TB, num_chunks, hidden_TBD, cell_TBD, act_TBG = saved
    d_output_BTD, d_last_BD = cotangents
    input_GF, recurrent_GD = input_kernel_FG.T.astype(dtype), recurrent_kernel_DG.T.astype(dtype)
    extra_time_steps = len(x_TBF) - like_0T.shape[1]
    d_output_TBD = jnp.pad(d_output_BTD.swapaxes(0, 1).astype(jnp.float32), ((0, extra_time_steps), (0, 0), (0, 0)))

    def step(state, inputs):
        d_hidden_BD, d_cell_BD = state
        d_output_BD, valid_B, act_BG, cell_before_BD, cell_BD = inputs
        valid_B1 = valid_B[:, None]
        d_hidden_BD = d_hidden_BD + jnp.where(valid_B1, d_output_BD, 0)
        activated = _gates(act_BG.astype(jnp.float32))
        d_gates, d_cell_before_BD = cell.backward(activated, cell_before_BD, cell_BD, d_hidden_BD, d_cell_BD)
        d_gates_BG = jnp.where(valid_B1, jnp.concatenate(d_gates, axis=-1), 0).astype(dtype)
        d_hidden_BD = jnp.where(valid_B1, _dot(d_gates_BG, recurrent_GD), d_hidden_BD)
        d_cell_BD = jnp.where(valid_B1, d_cell_before_BD, d_cell_BD)
        return (d_hidden_BD, d_cell_BD), d_gates_BG

    def chunk(k, carry):
        state, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF = carry
        start = (num_chunks - 1 - k) * CHUNK_STEPS
        inputs = tuple(_chunk_at(x, start) for x in (d_output_TBD, valid_TB, act_TBG, cell_TBD))
        inputs += (_chunk_at(cell_TBD, start + 1),)
        state, d_gates_CBG = jax.lax.scan(step, state, inputs, reverse=True, unroll=unroll)
        d_input_FG += _outer(_chunk_at(x_TBF, start), d_gates_CBG)
        d_recurrent_DG += _outer(_chunk_at(hidden_TBD, start).astype(dtype), d_gates_CBG)
        d_bias_G += d_gates_CBG.astype(jnp.float32).sum((0, 1))
        d_x_TBF = _put(d_x_TBF, _dot(d_gates_CBG, input_GF), start)
        return state, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    carry = ((d_last_BD, zeros(d_last_BD.shape)), zeros(input_kernel_FG.shape), zeros(recurrent_kernel_DG.shape))
    carry += (zeros(recurrent_kernel_DG.shape[1]), zeros(x_TBF.shape))
    _, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF = jax.lax.fori_loop(0, num_chunks, chunk, carry)
    d_x_BTF = d_x_TBF[: like_0T.shape[1]].swapaxes(0, 1).astype(like_0T.dtype)
    return d_input_FG, d_recurrent_DG, d_bias_G, d_x_BTF, None


chunked_lstm.defvjp(_save, _backward)


def _pad_to_chunks(x_BTF, length_B, dtype):
    """Return x (time first, padded to whole chunks, zeros past each series' end) and the mask of valid time steps."""
    num_time_steps = time_steps_run(x_BTF.shape[1])
    valid_TB = cell.valid_time_steps(length_B, num_time_steps).T
    x_TBF = jnp.pad(x_BTF.swapaxes(0, 1), ((0, num_time_steps - x_BTF.shape[1]), (0, 0), (0, 0)))
    return jnp.where(valid_TB[..., None], x_TBF, 0).astype(dtype), valid_TB


def time_steps_run(longest):
    """Return the time steps computed, in whole chunks, if the longest series has `longest`."""
    return -(-longest // CHUNK_STEPS) * CHUNK_STEPS


def _gates(x_BG) -> tuple:
    return tuple(jnp.split(x_BG, cell.NUM_GATES, axis=-1))


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _outer(a_CBX, b_CBY):
    return jnp.einsum("cbx,cby->xy", a_CBX, b_CBY, preferred_element_type=jnp.float32)


def _chunk_at(x_T, start):
    return jax.lax.dynamic_slice_in_dim(x_T, start, CHUNK_STEPS)


def _put(x_T, chunk_C, start):
    return jax.lax.dynamic_update_slice_in_dim(x_T, chunk_C, start, axis=0)
