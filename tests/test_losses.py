"""The losses match their definition: each head learns from the right rows, on two devices as on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax import losses

_RNG = np.random.default_rng(0)
_LOGITS = _RNG.normal(size=(6, 4)).astype(np.float32)
_LABELS = (_RNG.random((6, 4)) < 0.4).astype(np.float32)


def _plain(logits, labels):
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()


def test_cross_entropy_is_the_mean_over_rows_and_labels():
    loss = losses.mean_bce(_LOGITS, _LABELS, np.ones(6, bool), 6)
    np.testing.assert_allclose(loss, _plain(_LOGITS, _LABELS), rtol=1e-6)


def test_the_content_of_a_padded_row_changes_nothing():
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


_HEADS = (
    losses.Head("joint", needs=("cxr",)),
    losses.Head("ehr_only", needs=("ehr",), weight="ehr_only"),
    losses.Head("cxr_only", needs=("cxr",), weight="cxr_only", label="cxr_label"),
)
_TERMS = (
    losses.Term(losses.output("align_loss_rows"), "align", needs=("ehr", "cxr")),
    losses.Term(lambda outputs, label_BK: outputs["align_loss_rows"] * label_BK.sum(1), "domain", needs=("cxr",)),
)
_OUTPUTS = {
    name: jnp.asarray(_RNG.normal(size=(6, k)).astype(np.float32)) for name, k in (("joint", 4), ("ehr_only", 4))
}
_OUTPUTS["cxr_only"] = jnp.asarray(_RNG.normal(size=(6, 3)).astype(np.float32))
_OUTPUTS["align_loss_rows"] = jnp.arange(1.0, 7.0)
_IMAGE_LABELS = (_RNG.random((6, 3)) < 0.5).astype(np.float32)
# rows: both; EHR; X-ray; both; EHR; padded. The last X-ray slot is empty.
_STAYS = {
    "valid": np.array([1, 1, 1, 1, 1, 0], bool),
    "length": np.array([3, 5, 0, 1, 2, 0]),
    "image_row": np.array([3, 0, 2, 0]),
    "image_mask": np.array([True, True, True, False]),
    "label": _LABELS,
}
_IMAGES = {
    "valid": np.ones(6, bool),
    "image_row": np.arange(6),
    "image_mask": np.ones(6, bool),
    "cxr_label": _IMAGE_LABELS,
}


# Of three stays, the third of them padding: two hours, one hour, none.
_HOURLY = {
    "hour_mask": np.array([[1, 1], [1, 0], [0, 0]], bool),
    "label": _LABELS.reshape(3, 2, 4),
    "valid": np.array([1, 1, 0], bool),
}


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(("weighting", "weights"), [("hour", [1 / 3, 1 / 3, 1 / 3]), ("stay", [1 / 4, 1 / 4, 1 / 2])])
def test_an_hourly_loss_is_a_mean_over_hours_or_stays(exclusive, weighting, weights):
    labels = np.eye(4, dtype=np.float32)[[0, 3, 1, 2, 2, 2]] if exclusive else _LABELS
    logits = _LOGITS.copy()
    logits[3:] = np.nan  # no hours
    softmax = np.exp(_LOGITS) / np.exp(_LOGITS).sum(1, keepdims=True)
    each = [-np.log((softmax * labels).sum(1)[i]) if exclusive else _plain(_LOGITS[i], labels[i]) for i in range(3)]
    batch = _HOURLY | {"label": labels.reshape(3, 2, 4)}
    outputs = {"logits": jnp.asarray(logits.reshape(3, 2, 4))}

    def objective(batch, outputs, total):
        weights = dataclasses.replace(_weights(weighting=weighting), mean_hours=1.5)
        return losses.objective((losses.Head(),), outputs, batch, weights, total, exclusive)

    np.testing.assert_allclose(objective(batch, outputs, lambda x: x), np.dot(each, weights), rtol=1e-5)
    parts = jax.tree.map(lambda x: jnp.asarray(x)[:2, None], (batch, outputs))  # a stay on each of two devices
    of_device = jax.vmap(lambda *x: objective(*x, lambda x: jax.lax.psum(x, "device")), axis_name="device")(*parts)
    np.testing.assert_allclose(of_device.sum(), np.dot(each, weights), rtol=1e-5)


def _weights(**changes):
    return losses.Weights(**config_lib.section("loss", **{"domain": 0.0, **changes}))


def _objective(batch, weights=_weights(), outputs=_OUTPUTS):  # noqa: B008
    return losses.objective(_HEADS, outputs, batch, weights, total=lambda x: x, terms=_TERMS)


def _bce(name, labels, rows):
    return _plain(np.asarray(_OUTPUTS[name])[rows], labels[rows])


def test_each_head_learns_from_the_rows_that_have_what_it_needs():
    weights = _weights(ehr_only=0.5)
    expected = _bce("joint", _LABELS, [0, 2, 3]) + 0.5 * _bce("ehr_only", _LABELS, [0, 1, 3, 4])
    np.testing.assert_allclose(_objective(_STAYS, weights), expected, rtol=1e-6)
    everywhere = _bce("joint", _LABELS, [0, 1, 2, 3, 4]) + 0.5 * _bce("ehr_only", _LABELS, [0, 1, 2, 3, 4])
    assert abs(everywhere - expected) > 1e-3


def test_a_batch_of_images_with_their_own_labels_trains_the_image_head_alone():
    np.testing.assert_allclose(_objective(_IMAGES), _bce("cxr_only", _IMAGE_LABELS, slice(None)), rtol=1e-6)
    gradient = jax.grad(lambda outputs: _objective(_IMAGES, outputs=outputs))(_OUTPUTS)
    assert not np.any(gradient["joint"]) and not np.any(gradient["ehr_only"]) and np.all(gradient["cxr_only"])


def test_the_alignment_loss_is_the_mean_over_the_rows_that_have_both():
    weights = _weights(align=0.1)
    added = _objective(_STAYS, weights) - _objective(_STAYS)
    np.testing.assert_allclose(added, 0.1 * (1 + 4) / 2, rtol=1e-4)


def test_a_term_may_read_the_labels_and_padding_changes_nothing():
    weights, outputs = _weights(align=0.1, domain=0.2), {**_OUTPUTS}
    outputs["align_loss_rows"] = outputs["align_loss_rows"].at[5].set(jnp.nan)  # the padded row
    added = _objective(_STAYS, weights, outputs) - _objective(_STAYS)
    of_cxr = np.array([1, 3, 4]) * _LABELS[[0, 2, 3]].sum(1)
    np.testing.assert_allclose(added, 0.1 * 2.5 + 0.2 * of_cxr.mean(), rtol=1e-4)
    assert abs(0.2 * (np.arange(1, 6) * _LABELS[:5].sum(1)).mean() - 0.2 * of_cxr.mean()) > 1e-3  # all rows for it


def test_the_objectives_of_two_devices_add_up():
    weights = _weights(align=0.3, domain=0.4)
    # rows 0-2 with the X-ray of row 0; rows 3-5 with that of row 3; each device counts its rows from 0
    batch = {name: _STAYS[name].reshape(2, 3, *_STAYS[name].shape[1:]) for name in ("valid", "length", "label")}
    batch["image_row"], batch["image_mask"] = np.zeros((2, 2), int), np.array([[True, False], [True, False]])
    outputs = {name: x.reshape(2, 3, *x.shape[1:]) for name, x in _OUTPUTS.items()}

    def of_device(total):
        def objective(batch, outputs):
            return losses.objective(_HEADS, outputs, batch, weights, total, terms=_TERMS)

        return jax.vmap(objective, axis_name="device")(batch, outputs)

    whole = float(_objective({**_STAYS, "image_mask": np.array([True, True, False, False])}, weights))
    np.testing.assert_allclose(of_device(lambda x: jax.lax.psum(x, "device")).sum(), whole, rtol=1e-6)
    assert abs(of_device(lambda x: x).sum() - whole) > 1e-3  # each a mean of its own: too large


def test_a_head_without_usable_rows_gives_no_loss_and_no_gradient():
    batch = {**_STAYS, "image_mask": np.zeros(4, bool), "length": np.zeros(6, int)}
    weights = _weights(align=1.0, domain=1.0)
    assert float(_objective(batch, weights)) == pytest.approx(0.0, abs=0)
    gradient = jax.grad(lambda outputs: _objective(batch, weights, outputs))(_OUTPUTS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
