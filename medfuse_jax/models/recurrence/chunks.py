"""The recurrence in chunks of steps, and only as many as the longest series needs: the form that runs anywhere.

Shapes: B batch, T time, C steps a chunk, F input channel, D LSTM width, G = 4 D gates (i, f, g, o).

What it saves beside the plain scan (`lstm.masked_lstm`, which it is tested against):
- the loop's trip count is the batch's longest length, not T: padding to a bucket costs memory, not time,
  so a few buckets (compilations) serve stays of any length;
- the input product of a chunk is one matrix product, and so are the gradients of both kernels, which
  autodiff of a scan would add up step by step.
"""

import functools

import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence import cell

# As many chunks of the first size as the longest series fills, and what is left of it in chunks of the next, of which
# it is a multiple: large chunks make large matrix products, small ones run few steps that no stay has.
CHUNK_STEPS = (16, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_lstm(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype):
    """Hidden states [B, T, D] (zeros past a series' end) and the last one [B, D] (zeros for a length of 0).

    Kernels and bias float32; x any float; length int [B]. dtype: of the products, which add up in
    float32 as the state does. What x holds past a series' end, NaN included, reaches nothing.
    """
    return _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype)[0]


def _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype):
    x_TBF, valid_TB = _by_chunks(x_BTF, length_B, dtype)
    num_steps, num_rows, _ = x_TBF.shape
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

    def chunk(start, size, carry):
        state, hidden_TBD, cell_TBD, act_TBG = carry
        x_CBF, valid_CB = _at(x_TBF, start, size), _at(valid_TB, start, size)
        product_CBG = _dot(x_CBF, input_FG) + bias_G
        state, (hidden_CBD, cell_CBD, act_CBG) = jax.lax.scan(step, state, (product_CBG, valid_CB))
        # One row later: row t holds the state before step t, which is what the backward pass asks for.
        hidden_TBD = _put(hidden_TBD, hidden_CBD, start + 1)
        cell_TBD = _put(cell_TBD, cell_CBD, start + 1)
        return state, hidden_TBD, cell_TBD, _put(act_TBG, act_CBG.astype(dtype), start)

    zeros_BD = jnp.zeros((num_rows, width), jnp.float32)
    zeros_TBD = jnp.zeros((num_steps + 1, num_rows, width), jnp.float32)
    carry = ((zeros_BD, zeros_BD), zeros_TBD, zeros_TBD, jnp.zeros((num_steps, num_rows, 4 * width), dtype))
    longest = jnp.max(length_B)
    (last_BD, _), hidden_TBD, cell_TBD, act_TBG = _forward_through(chunk, longest, carry)
    output_TBD = jnp.where(valid_TB[..., None], hidden_TBD[1:], 0)[: x_BTF.shape[1]]
    saved = (input_kernel_FG, recurrent_kernel_DG, x_TBF, valid_TB, longest, hidden_TBD, cell_TBD, act_TBG)
    return (output_TBD.swapaxes(0, 1), last_BD.astype(jnp.float32)), saved


def _forward_saving(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype):
    outputs, saved = _forward(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype)
    return outputs, (saved, jnp.zeros((0, x_BTF.shape[1]), x_BTF.dtype))  # carries x's type and T


def _backward(dtype, residuals, cotangents):
    saved, like_0T = residuals
    input_kernel_FG, recurrent_kernel_DG, x_TBF, valid_TB, longest, hidden_TBD, cell_TBD, act_TBG = saved
    d_output_BTD, d_last_BD = cotangents
    num_steps, num_rows, _ = x_TBF.shape
    input_GF, recurrent_GD = input_kernel_FG.T.astype(dtype), recurrent_kernel_DG.T.astype(dtype)
    d_output_TBD = jnp.zeros((num_steps, num_rows, d_last_BD.shape[-1]), jnp.float32)
    d_output_TBD = d_output_TBD.at[: like_0T.shape[1]].set(d_output_BTD.swapaxes(0, 1).astype(jnp.float32))

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

    def chunk(start, size, carry):
        state, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF = carry
        cells = (_at(cell_TBD, start, size), _at(cell_TBD, start + 1, size))
        inputs = (_at(d_output_TBD, start, size), _at(valid_TB, start, size), _at(act_TBG, start, size), *cells)
        state, d_gates_CBG = jax.lax.scan(step, state, inputs, reverse=True)
        d_input_FG += _outer(_at(x_TBF, start, size), d_gates_CBG)
        d_recurrent_DG += _outer(_at(hidden_TBD, start, size).astype(dtype), d_gates_CBG)
        d_bias_G += d_gates_CBG.astype(jnp.float32).sum((0, 1))
        d_x_TBF = _put(d_x_TBF, _dot(d_gates_CBG, input_GF), start)
        return state, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF

    zeros_of = functools.partial(jnp.zeros, dtype=jnp.float32)
    state = (d_last_BD.astype(jnp.float32), zeros_of(d_last_BD.shape))
    carry = (state, zeros_of(input_kernel_FG.shape), zeros_of(recurrent_kernel_DG.shape))
    carry += (zeros_of(recurrent_kernel_DG.shape[1]), zeros_of(x_TBF.shape))
    _, d_input_FG, d_recurrent_DG, d_bias_G, d_x_TBF = _backward_through(chunk, longest, carry)
    d_x_BTF = d_x_TBF[: like_0T.shape[1]].swapaxes(0, 1).astype(like_0T.dtype)
    return d_input_FG, d_recurrent_DG, d_bias_G, d_x_BTF, None


chunked_lstm.defvjp(_forward_saving, _backward)


def _by_chunks(x_BTF, length_B, dtype):
    """Time first, padded to whole chunks (a large one at least), cleared past each series' end; and what is valid."""
    num_steps = max(steps_run(x_BTF.shape[1]), CHUNK_STEPS[0])
    valid_TB = cell.valid_steps(length_B, num_steps).T
    x_TBF = jnp.pad(x_BTF.swapaxes(0, 1), ((0, num_steps - x_BTF.shape[1]), (0, 0), (0, 0)))
    return jnp.where(valid_TB[..., None], x_TBF, 0).astype(dtype), valid_TB


def steps_run(longest):
    """How many steps are run where the longest series has so many: whole chunks of the smallest size."""
    return -(-longest // CHUNK_STEPS[-1]) * CHUNK_STEPS[-1]


def _spans(longest) -> list[tuple]:
    """(steps a chunk, where the first begins, how many) for each size, in the order of the steps."""
    spans, start = [], 0
    for size in CHUNK_STEPS:
        number = (steps_run(longest) - start) // size
        spans.append((size, start, number))
        start += number * size
    return spans


def _forward_through(chunk, longest, carry):
    """The carry after `chunk(start, size, carry)` of every chunk, from the first to the last."""
    for size, start, number in _spans(longest):

        def nth(k, carry, size=size, start=start):
            return chunk(start + k * size, size, carry)

        carry = jax.lax.fori_loop(0, number, nth, carry)
    return carry


def _backward_through(chunk, longest, carry):
    """The same from the last chunk to the first."""
    for size, start, number in reversed(_spans(longest)):

        def nth_last(k, carry, size=size, last=start + (number - 1) * size):
            return chunk(last - k * size, size, carry)

        carry = jax.lax.fori_loop(0, number, nth_last, carry)
    return carry


def _gates(x_BG) -> tuple:
    return tuple(jnp.split(x_BG, cell.NUM_GATES, axis=-1))


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _outer(a_CBX, b_CBY):
    return jnp.einsum("cbx,cby->xy", a_CBX, b_CBY, preferred_element_type=jnp.float32)


def _at(x_T, start, size):
    return jax.lax.dynamic_slice_in_dim(x_T, start, size)


def _put(x_T, chunk_C, start):
    return jax.lax.dynamic_update_slice_in_dim(x_T, chunk_C, start, axis=0)
