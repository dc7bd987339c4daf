"""The optimiser against optax's own Adam; plateau and early stopping as the released code counts."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medfuse_jax import optim


def test_adam_with_a_traced_rate_is_adam():
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


def test_the_rate_is_halved_after_ten_validations_without_a_better_loss():
    progress = optim.Progress(learning_rate=1.0)
    progress.update(1, val_loss=0.5, val_auroc=0.6, plateau_epochs=10)
    for epoch in range(2, 12):
        progress.update(epoch, val_loss=0.5, val_auroc=0.6, plateau_epochs=10)
        assert progress.learning_rate == 1.0
    progress.update(12, val_loss=0.49999, val_auroc=0.6, plateau_epochs=10)  # less than 1e-4 better
    assert progress.learning_rate == 0.5
    for epoch in range(13, 23):
        progress.update(epoch, val_loss=0.5, val_auroc=0.6, plateau_epochs=10)
    assert progress.learning_rate == 0.5
    progress.update(23, val_loss=0.5, val_auroc=0.6, plateau_epochs=10)
    assert progress.learning_rate == 0.25


def test_a_better_loss_starts_the_count_anew():
    progress = optim.Progress(learning_rate=1.0)
    for epoch in range(1, 40):
        loss = 0.5 - 0.01 * (epoch // 8)
        progress.update(epoch, val_loss=loss, val_auroc=0.6, plateau_epochs=10)
    assert progress.learning_rate == 1.0


def test_stops_when_the_auroc_has_not_improved_for_the_given_epochs():
    progress = optim.Progress()
    assert progress.update(1, 0.5, 0.7, 10)
    for epoch in range(2, 16):
        assert not progress.update(epoch, 0.5, 0.69, 10)
        assert not progress.should_stop(15)
    progress.update(16, 0.5, 0.7, 10)  # equal is not better
    assert progress.should_stop(15) and progress.best_epoch == 1


def test_a_nan_auroc_is_the_best_only_where_nothing_else_is():
    progress = optim.Progress()
    assert progress.update(1, 0.5, math.nan, 10)
    assert progress.update(2, 0.5, 0.4, 10)
    assert not progress.update(3, 0.5, math.nan, 10)
    assert progress.best_auroc == pytest.approx(0.4)
