"""The LSTM as one GPU kernel forward and one backward (Pallas, through Triton), without a launch per time step.

Shapes: B batch, R rows per program, T time, F input channel, D LSTM width, U units per tile, K = 4 gates.

Each program of the grid runs R rows, up to the longest of them. The input product and both weight gradients are single
products over all time steps, outside the kernels. A time step computes only the recurrent product, and reads its
weights from the GPU's L2 cache, one tile of units at a time.

Past a row's end, a program continues with zero input. The forward pass masks those outputs afterwards. The backward
pass starts there with zero state gradients, so everything it computes there is zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from medfuse_jax.models.recurrence import cell

_GATES = range(cell.NUM_GATES)
_ROWS = 16  # rows per program: the minimum of a matrix unit
_MIN_TILE_UNITS = 16  # also the minimum of a matrix unit
_TILE_BYTES = 64  # one row of a tile
_COMPILER = plgpu.CompilerParams(num_warps=8, num_stages=2)


def pallas_lstm(input_kernel_FG, recurrent_kernel_DG, bias_G, x_BTF, length_B, dtype, interpret=False):
    """Run an LSTM like `chunked_lstm`, on a GPU that Triton supports.

    interpret: run the kernels in the interpreter, which is slow but works on any backend; for tests.
    """
    num_rows, num_time_steps, _ = x_BTF.shape
    width = len(recurrent_kernel_DG)
    # Padding rows have no time steps and padding units have zero weights: their states stay zero, since tanh(0) = 0.
    extra_rows, extra_units = -num_rows % _ROWS, max(2 * _MIN_TILE_UNITS, pl.next_power_of_2(width)) - width

    def by_gate(x_G):
        x_KD = x_G.reshape(*x_G.shape[:-1], cell.NUM_GATES, width)
        return jnp.pad(x_KD, [(0, 0)] * (x_KD.ndim - 1) + [(0, extra_units)])

    recurrent_DKD = jnp.pad(by_gate(recurrent_kernel_DG), ((0, extra_units), (0, 0), (0, 0)))
    x_TBF = jnp.pad(x_BTF.swapaxes(0, 1), ((0, 0), (0, extra_rows), (0, 0)))
    padded_B = jnp.pad(length_B, (0, extra_rows))
    x_TBF = jnp.where(_valid(padded_B, num_time_steps), x_TBF, 0).astype(jnp.float32)
    kernels = (by_gate(input_kernel_FG), recurrent_DKD, by_gate(bias_G))
    hidden_TBD = _recurrence(*kernels, x_TBF, padded_B, jnp.dtype(dtype), interpret)[:, :num_rows, :width]
    last_BD = hidden_TBD[jnp.maximum(length_B, 1) - 1, jnp.arange(num_rows)]  # all zeros for a length of 0
    return hidden_TBD.swapaxes(0, 1), last_BD


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _recurrence(input_FKD, recurrent_DKD, bias_KD, x_TBF, length_B, dtype, interpret):
    """Return the hidden states float32 [T, B, D], zeros past a series' end.

    x must be zero past a series' end too, B a multiple of R, and D a power of two. dtype: of the products.
    """
    return _forward(input_FKD, recurrent_DKD, bias_KD, x_TBF, length_B, dtype, interpret)[0]


def _forward(input_FKD, recurrent_DKD, bias_KD, x_TBF, length_B, dtype, interpret):
    x_TBF = x_TBF.astype(dtype)
    product_TBKD = _einsum("tbf,fkd->tbkd", x_TBF, input_FKD.astype(dtype)) + bias_KD
    num_time_steps, num_rows, _, width = product_TBKD.shape
    states = jax.ShapeDtypeStruct((num_time_steps + 1, num_rows, width), jnp.float32)
    activated = jax.ShapeDtypeStruct(product_TBKD.shape, dtype)
    hidden_TBD, cell_TBD, activated_TBKD = _by_rows(
        _forward_kernel,
        outputs=[(states, 1), (states, 1), (activated, 1)],
        inputs=[(length_B, 0), (product_TBKD, 1), (recurrent_DKD.astype(dtype), None)],
        interpret=interpret,
    )
    saved = (input_FKD, recurrent_DKD, x_TBF, length_B, hidden_TBD, cell_TBD, activated_TBKD)
    return jnp.where(_valid(length_B, num_time_steps), hidden_TBD[1:], 0), saved


def _backward(dtype, interpret, saved, d_output_TBD):
    input_FKD, recurrent_DKD, x_TBF, length_B, hidden_TBD, cell_TBD, activated_TBKD = saved
    valid_TB1 = _valid(length_B, len(x_TBF))
    recurrent_KDD = recurrent_DKD.astype(dtype).transpose(1, 2, 0)
    state = jax.ShapeDtypeStruct(hidden_TBD.shape[1:], jnp.float32)
    d_output_TBD = jnp.where(valid_TB1, d_output_TBD, 0)
    d_gates_TBKD, _, _ = _by_rows(
        _backward_kernel,
        outputs=[(jax.ShapeDtypeStruct(activated_TBKD.shape, dtype), 1), (state, 0), (state, 0)],
        inputs=[(length_B, 0), (d_output_TBD, 1), (activated_TBKD, 1), (cell_TBD, 1), (recurrent_KDD, None)],
        interpret=interpret,
    )
    # Steps past a program's longest row were never written, and hold arbitrary values.
    d_gates_TBKD = jnp.where(valid_TB1[..., None], d_gates_TBKD, 0)
    before_TBD = jnp.where(valid_TB1, hidden_TBD[:-1], 0).astype(dtype)
    return (
        _einsum("tbf,tbkd->fkd", x_TBF, d_gates_TBKD),
        _einsum("tbe,tbkd->ekd", before_TBD, d_gates_TBKD),
        d_gates_TBKD.astype(jnp.float32).sum((0, 1)),
        _einsum("tbkd,fkd->tbf", d_gates_TBKD, input_FKD.astype(dtype)),
        None,
    )


_recurrence.defvjp(_forward, _backward)


def _forward_kernel(length_ref, product_ref, recurrent_ref, hidden_ref, cell_ref, activated_ref, *, barrier):
    """Run the time steps. Row t of `hidden` and `cell` is the state before time step t."""
    hidden_ref[0] = jnp.zeros(hidden_ref.shape[1:], hidden_ref.dtype)
    cell_ref[0] = jnp.zeros(cell_ref.shape[1:], cell_ref.dtype)

    def step(t, _):
        barrier()  # other threads have written the state
        hidden_RD = hidden_ref[t].astype(recurrent_ref.dtype)

        def tile(units, _):
            gates = tuple(product_ref[t, :, k, units] + _dot(hidden_RD, recurrent_ref[:, k, units]) for k in _GATES)
            activated, cell_RU, hidden_RU = cell.forward(gates, cell_ref[t, :, units])
            for k in _GATES:
                activated_ref[t, :, k, units] = activated[k].astype(activated_ref.dtype)
            cell_ref[t + 1, :, units] = cell_RU
            hidden_ref[t + 1, :, units] = hidden_RU

        _for_each_tile(recurrent_ref, tile, None)

    jax.lax.fori_loop(0, jnp.max(length_ref[...]), step, None)


def _backward_kernel(
    length_ref, d_output_ref, activated_ref, cell_ref, recurrent_ref, d_gates_ref, d_hidden_ref, d_cell_ref, *, barrier
):
    """Run the time steps backwards. `d_hidden` and `d_cell` [R, D] hold the gradients of the state between them."""
    d_hidden_ref[...] = jnp.zeros(d_hidden_ref.shape, d_hidden_ref.dtype)
    d_cell_ref[...] = jnp.zeros(d_cell_ref.shape, d_cell_ref.dtype)
    longest = jnp.max(length_ref[...])

    def step(n, _):
        t = longest - 1 - n
        barrier()

        def tile(units, d_before_RD):
            activated = tuple(activated_ref[t, :, k, units].astype(jnp.float32) for k in _GATES)
            d_hidden_RU = d_hidden_ref[:, units] + d_output_ref[t, :, units]
            cells = (cell_ref[t, :, units], cell_ref[t + 1, :, units])
            d_gates, d_cell_ref[:, units] = cell.backward(activated, *cells, d_hidden_RU, d_cell_ref[:, units])
            for k in _GATES:
                d_gate_RU = d_gates[k].astype(d_gates_ref.dtype)
                d_gates_ref[t, :, k, units] = d_gate_RU
                d_before_RD += _dot(d_gate_RU, recurrent_ref[k, units, :])
            return d_before_RD

        d_before_RD = _for_each_tile(recurrent_ref, tile, jnp.zeros(d_hidden_ref.shape, jnp.float32))
        barrier()  # all threads have read the state's gradients, which are overwritten next
        d_hidden_ref[...] = d_before_RD

    jax.lax.fori_loop(0, longest, step, None)


def _for_each_tile(recurrent_ref, tile, start):
    """Loop `carry = tile(units, carry)` over all tiles of units, beginning with `start`.

    There are always at least two tiles: Triton would unroll a loop over one tile. The loop over time steps would then
    be the innermost, and Triton would prefetch the next time step's state before all threads have written it.
    """
    width = recurrent_ref.shape[-1]
    size = min(_TILE_BYTES // recurrent_ref.dtype.itemsize, width // 2)
    return jax.lax.fori_loop(0, width // size, lambda n, carry: tile(pl.ds(n * size, size), carry), start)


def _by_rows(kernel, outputs: list[tuple], inputs: list[tuple], interpret: bool) -> list[jax.Array]:
    """Call the kernel with one program per R rows. Each array comes with its row axis, or None to pass it whole."""
    length_B, _ = inputs[0]
    call = pl.pallas_call(
        functools.partial(kernel, barrier=_barrier(interpret)),
        out_shape=[shape for shape, _ in outputs],
        grid=len(length_B) // _ROWS,
        in_specs=[_block(array, axis) for array, axis in inputs],
        out_specs=[_block(shape, axis) for shape, axis in outputs],
        compiler_params=_COMPILER,
        interpret=interpret,
    )
    return call(*(array for array, _ in inputs))


def _block(like, row_axis: int | None) -> pl.BlockSpec:
    """Return the spec of the part of an array that one program reads or writes."""
    shape = [_ROWS if axis == row_axis else size for axis, size in enumerate(like.shape)]
    return pl.BlockSpec(shape, lambda n: tuple(n if axis == row_axis else 0 for axis in range(len(shape))))


def _valid(length_B, num_time_steps: int) -> jax.Array:
    """Return the mask of valid time steps, bool [T, B, 1]."""
    return cell.valid_time_steps(length_B, num_time_steps).T[..., None]


def _barrier(interpret: bool):
    """Return a barrier for all threads of a program; a no-op in the interpreter, which has a single thread."""
    return (lambda: None) if interpret else plgpu.debug_barrier


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _einsum(spec: str, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
