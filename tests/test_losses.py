"""The loss against its definition, and over two devices against one."""

import jax.numpy as jnp
import numpy as np

from medfuse_jax import losses

_RNG = np.random.default_rng(0)
_LOGITS = _RNG.normal(size=(6, 4)).astype(np.float32)
_LABELS = (_RNG.random((6, 4)) < 0.4).astype(np.float32)


def _plain(logits, labels):
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()


def test_is_the_mean_over_rows_and_labels():
    loss = losses.mean_bce(_LOGITS, _LABELS, np.ones(6, bool), 6)
    np.testing.assert_allclose(loss, _plain(_LOGITS, _LABELS), rtol=1e-6)


def test_a_padded_row_counts_for_nothing_whatever_it_holds():
    valid = np.array([1, 1, 0, 1, 1, 1], bool)
    logits = _LOGITS.copy()
    logits[2] = np.nan
    loss = losses.mean_bce(jnp.asarray(logits), _LABELS, valid, valid.sum())
    np.testing.assert_allclose(loss, _plain(_LOGITS[valid], _LABELS[valid]), rtol=1e-6)
    assert abs(float(loss) - _plain(_LOGITS, _LABELS)) > 1e-3


def test_the_parts_of_two_devices_add_up():
    valid = np.array([1, 1, 1, 1, 1, 0], bool)
    parts = [losses.mean_bce(_LOGITS[h], _LABELS[h], valid[h], 5) for h in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(sum(map(float, parts)), _plain(_LOGITS[:5], _LABELS[:5]), rtol=1e-6)


def test_a_batch_of_padding_alone_has_loss_zero():
    assert float(losses.mean_bce(_LOGITS, _LABELS, np.zeros(6, bool), 0)) == 0.0
