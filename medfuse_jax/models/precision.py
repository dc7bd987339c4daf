"""Precision: the type of the encoders' matrix products, and how exactly an accelerator computes them."""

import contextlib

import jax
import jax.numpy as jnp


def compute_dtype(precision: str, platform: str) -> jnp.dtype:
    """Return the type for config.precision. 'auto': bfloat16, but float32 on a CPU, where bfloat16 gains nothing."""
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def matmul_precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Return a context that makes float32 products exact if `dtype` is float32: accelerators round them by default."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
