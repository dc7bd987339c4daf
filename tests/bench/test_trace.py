"""What a trace of ten steps counts, beside the compiled program."""

import dataclasses
import types

import jax
import jax.numpy as jnp

from medfuse_jax.bench import cases, trace


def _plane(name, **lines):
    made = [
        types.SimpleNamespace(
            name=line.replace("_", " "), events=[types.SimpleNamespace(name=n, duration_ns=2000.0) for n in events]
        )
        for line, events in lines.items()
    ]
    return types.SimpleNamespace(name=name, lines=made)


def test_kernels_of_the_device_and_launches_of_the_host_are_counted():
    host = _plane("/host:CPU", main=["cuLaunchKernel", "cuGraphLaunch", "cudaMemcpyAsync", "cuStreamWaitEvent", "step"])
    device = _plane("/device:GPU:0", Stream_13=["gemm", "conv"], Stream_14=["copy"], XLA_Modules=["jit_step"])
    counted = trace.events(types.SimpleNamespace(planes=[host, device]))
    assert counted == {"device_events_a_step": 3, "device_us_a_step": 6.0, "launches_a_step": 3}
    assert set(trace.events(types.SimpleNamespace(planes=[host])).values()) == {None}


def test_kernels_in_the_compiled_program_grow_with_the_series():
    def loop(x, length):
        return jax.lax.while_loop(lambda c: c[0] < length, lambda c: (c[0] + 1, jnp.sin(c[1] @ c[1])), (0, x))[1]

    compiled = jax.jit(loop).lower(jnp.ones((8, 8)), 4).compile()
    short, long = (trace.compiled_kernels(compiled, steps) for steps in (4, 40))
    assert 0 < short < long < 11 * short


def test_record_has_the_compiled_count_and_on_a_cpu_no_launches():
    case = next(case for case in cases.preset("tiny")[0] if case.kind == "trace")
    (row,) = trace.measure(dataclasses.replace(case, method="uni_ehr", num_batches=1))
    assert row["compiled_kernels_a_step"] > 0 and row["seconds"] > 0 and row["launches_a_step"] is None
