"""The LSTM's GPU kernels: interpreted, against the plain scan; and as lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_cases import TOLERANCE, assert_close, assert_padding_is_zero, case, plain, poisoned, with_gradients
from model_cases import equations

from medfuse_jax.models import ehr_encoder
from medfuse_jax.models.recurrence import cell, pallas

_ROWS = pallas._ROWS
_ON_GPU = jax.default_backend() == "gpu"  # runs the compiled kernels


def recurrence(weights, x_BTF, length_B, dtype=jnp.float32):
    kernels = (weights["input_kernel"], weights["recurrent_kernel"], weights["bias"])
    return pallas.pallas_lstm(*kernels, x_BTF, length_B, jnp.dtype(dtype), interpret=not _ON_GPU)


_KERNELS, _PLAIN = with_gradients(recurrence), with_gradients(plain)


@pytest.mark.parametrize(
    ("num_steps", "lengths", "width"),
    [
        (1, [1, 0], 4),
        (7, [7, 3, 0, 1], 32),  # the minimum of units
        (5, [5, 2], 40),  # padding units in the last of four tiles
        (9, [9, 4] * (_ROWS // 2) + [3, 0, 1], 4),  # a second program, which stops earlier
        (6, [2, 4], 4),  # nobody has the last steps
        (3, [0, 0], 4),
    ],
)
def test_outputs_and_gradients_match_the_plain_scan(num_steps, lengths, width):
    series = case(num_steps, lengths, width=width)
    assert_close(_KERNELS(*series), _PLAIN(*series))


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wrong_step_exceeds_the_tolerance(monkeypatch, part):
    right = getattr(cell, part)

    def wrong(*args):
        gates, *states = right(*args)
        return (gates[0] * 1.001, *gates[1:]), *states

    monkeypatch.setattr(cell, part, wrong)
    jax.clear_caches()  # earlier traces hold the right step
    series = case(7, [7, 3, 0, 1])
    (_, (d_weights, _)), (_, (expected, _)) = with_gradients(recurrence)(*series), _PLAIN(*series)
    monkeypatch.undo()
    jax.clear_caches()
    worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), d_weights, expected)))
    assert worst > 3 * TOLERANCE


def test_padding_values_affect_neither_outputs_nor_gradients():
    weights, x_BTF, length_B = case(8, [5, 3, 0])
    nans_BTF = poisoned(x_BTF, length_B)
    jax.tree.map(
        np.testing.assert_array_equal, _KERNELS(weights, x_BTF, length_B), _KERNELS(weights, nans_BTF, length_B)
    )
    hidden_BTD, last_BD = recurrence(weights, nans_BTF, length_B)
    assert_padding_is_zero(hidden_BTD, length_B)
    assert not np.any(last_BD[2])


def test_bfloat16_rounds_where_the_chunks_do():
    weights, x_BTF, length_B = case(12, [12, 7], width=32)
    rounded, exact = (
        with_gradients(functools.partial(recurrence, dtype=dtype))(weights, x_BTF, length_B)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    chunks = with_gradients(functools.partial(ehr_encoder.lstm, dtype=jnp.bfloat16))(weights, x_BTF, length_B)
    if _ON_GPU:  # another summation order rounds a few values differently
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max()), rounded, chunks)
    else:
        assert_close(rounded, chunks)
    assert abs(rounded[0] - exact[0]) > 10 * TOLERANCE * abs(exact[0])


def test_vmap_over_trials_matches_each_trial_alone():
    cases = [case(6, [6, 3], seed=seed) for seed in (0, 1)]
    _, x_BTF, length_B = cases[0]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(weights for weights, _, _ in cases))
    together = jax.jit(jax.vmap(_KERNELS, in_axes=(0, None, None)))(stacked, x_BTF, length_B)
    for i, (weights, _, _) in enumerate(cases):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), _PLAIN(weights, x_BTF, length_B))


def test_an_encoder_runs_both_layers_with_its_kernel(monkeypatch):
    widths = []

    def kernel(input_kernel_FG, *rest):
        widths.append(len(input_kernel_FG))
        return pallas.pallas_lstm(input_kernel_FG, *rest, interpret=not _ON_GPU)

    monkeypatch.setitem(ehr_encoder.LSTM_KERNELS, "pallas", kernel)
    weights, x_BTF, length_B = case(7, [7, 3, 0], width=8)
    second, _, _ = case(7, [1], seed=1, num_inputs=8, width=8)
    variables = {"params": {"layer0": weights, "layer1": second}}
    with jax.default_matmul_precision("highest"):
        ours, chunks = (
            ehr_encoder.EhrEncoder(width=8, recurrence=name).apply(variables, x_BTF, length_B)
            for name in ("pallas", "chunks")
        )
    assert_close(ours, chunks)
    assert widths == [5, 8]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("trials", [0, 2])
def test_a_gpu_program_has_one_kernel_forward_and_one_backward(dtype, trials):
    text = traced(256, dtype, trials).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2 and "stablehlo.while" not in text


@pytest.mark.parametrize("width", [1, 16, 64, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_meet_tritons_minimum(width, dtype):
    """At least two tiles (see pallas._for_each_tile), each at least 16 wide."""
    kernels = [e for e in equations(traced(width, dtype).jaxpr.jaxpr) if e.primitive.name == "pallas_call"]
    assert len(kernels) == 2
    for kernel in kernels:
        body = list(equations(kernel.params["jaxpr"]))
        tiles = [e.params["length"] for e in body if e.primitive.name == "scan"]
        assert len(tiles) == 1 and tiles[0] >= 2
        factors = [x.aval.shape for e in body if e.primitive.name == "dot_general" for x in e.invars]
        assert len(factors) == 8 and min(min(shape) for shape in factors) >= 16


def test_barriers_order_reads_and_writes_of_the_state():
    """Checked on the jaxpr: the interpreter has one thread and no barriers."""
    forward, backward = (
        [e.primitive.name.removesuffix("_p") for e in loop.params["body_jaxpr"].jaxpr.eqns]
        for kernel in equations(traced(256, jnp.float32).jaxpr.jaxpr)
        if kernel.primitive.name == "pallas_call"
        for loop in equations(kernel.params["jaxpr"])
        if loop.primitive.name == "while"
    )
    for step in (forward, backward):
        assert "get" not in step[: step.index("debug_barrier")], "a step reads before its barrier"
        assert step.index("debug_barrier") < step.index("scan")
    assert "get" in forward[: forward.index("scan")]  # the state, read once for all tiles
    after_tiles = backward[backward.index("scan") :]  # all have read what is overwritten then
    assert after_tiles.index("debug_barrier") < after_tiles.index("swap")


def traced(width: int, dtype, trials: int = 0):
    """Trace a layer's gradient for an abstract GPU; trials: how many a vmap stacks, 0 for none."""

    def loss(weights, x_BTF, length_B):
        return ehr_encoder.lstm(weights, x_BTF, length_B, dtype, "pallas")[1].sum()

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    sizes = {"input_kernel": (76, 4 * width), "recurrent_kernel": (width, 4 * width), "bias": (4 * width,)}
    weights = {name: shape((trials, *size) if trials else size) for name, size in sizes.items()}
    gradient = jax.vmap(jax.grad(loss), (0, None, None)) if trials else jax.grad(loss)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)):
        return jax.jit(gradient).trace(weights, shape((20, 40, 76)), jax.ShapeDtypeStruct((20,), jnp.int32))
