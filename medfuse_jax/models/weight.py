"""How our modules declare a weight."""

from collections.abc import Callable

import jax
from flax import linen as nn


def weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """Return `module.param(name, init, shape)`, without tracing `init` again where the weight exists already.

    Flax does that to compare shapes, each time a model is traced: a sixth of the time to trace MedFuse's step.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    assert value.shape == shape, f"{name} has shape {value.shape}, not {shape}"
    return value
