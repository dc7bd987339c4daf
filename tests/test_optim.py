"""The optimiser against optax's own Adam."""

import jax.numpy as jnp
import numpy as np
import optax

from medfuse_jax import optim


def test_adam_with_a_traced_rate_equals_optax():
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    ours, theirs = optim.adam(0.999), optax.adam(1e-2)
    state_a, state_b, params_a, params_b = ours.init(params), theirs.init(params), params, params
    for step in range(5):
        grads = {"w": jnp.sin(params_a["w"] * (step + 1))}
        direction, state_a = ours.update(grads, state_a)
        params_a = optim.descend(params_a, direction, jnp.float32(1e-2))
        updates, state_b = theirs.update(grads, state_b)
        params_b = optax.apply_updates(params_b, updates)
    np.testing.assert_allclose(params_a["w"], params_b["w"], rtol=1e-6)
    assert np.abs(np.asarray(params_a["w"]) - params["w"]).min() > 1e-3
