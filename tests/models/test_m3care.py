"""M3Care: its bank of patients, the weights of similar ones, and that a score depends on no other row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import fast_jit, random_variables, tiny_model

from medfuse_jax.models import m3care

_J, _D = m3care.BANK_ROWS, 8
_RNG = np.random.default_rng(0)
# Rows: both modalities; EHR; X-ray; both. The rows of a batch need not come in the order of their ids.
_FEATURES = {
    "ehr_features": _RNG.normal(size=(4, _D)).astype(np.float32) * np.array([[1], [1], [0], [1]], np.float32),
    "length": np.array([3, 2, 0, 4], np.int32),
    "cxr_features": _RNG.normal(size=(3, _D)).astype(np.float32),
    "image_row": np.array([0, 2, 3]),
    "dropout_rows": np.array([5, 1, 2, 0]),
}


@pytest.fixture(scope="module")
def model():
    """The model, variables whose bank holds three rows, and compiled training and scoring."""
    model = tiny_model("m3care", dropout=0.0)
    variables = random_variables(model)
    variables["batch_stats"]["bank"]["filled"] = jnp.zeros(_J).at[:3].set(1.0)

    def apply(variables, inputs, axis_name=None):
        return model.apply(variables, **inputs, train=True, axis_name=axis_name, mutable=["batch_stats"])

    return model, variables, fast_jit(apply), fast_jit(lambda variables, inputs: model.apply(variables, **inputs))


def _bank(variables) -> dict:
    return jax.tree.map(np.asarray, variables["batch_stats"]["bank"])


def _with_bank(variables, **changes) -> dict:
    bank = {**variables["batch_stats"]["bank"], **changes}
    return {**variables, "batch_stats": {**variables["batch_stats"], "bank": bank}}


def test_training_puts_the_rows_with_both_modalities_in_front(model):
    _, variables, train, _ = model
    outputs, updated = train(variables, _FEATURES)
    before, after = _bank(variables), _bank(updated)
    for name, features in (("ehr", outputs["ehr_features"]), ("cxr", outputs["cxr_features"])):
        np.testing.assert_allclose(after[name][:2], features[np.array([3, 0])], atol=1e-6)  # by their ids
        np.testing.assert_array_equal(after[name][2:], before[name][:-2])
    np.testing.assert_array_equal(after["filled"], np.arange(_J) < 5)


def test_two_devices_store_what_one_does():
    rng = np.random.default_rng(1)
    bank_J, new_B, is_new_B = rng.normal(size=(6, 2)), rng.normal(size=(8, 2)), rng.random(8) < 0.6
    row_id_B = rng.permutation(8)
    one = m3care._pushed(*map(jnp.asarray, (bank_J, new_B, is_new_B, row_id_B)))
    other = rng.permutation(8)  # dealt to the devices in another order
    moved = m3care._pushed(*map(jnp.asarray, (bank_J, new_B[other], is_new_B[other], row_id_B[other])))
    np.testing.assert_array_equal(one, moved)
    newest = new_B[np.argsort(row_id_B)][is_new_B[np.argsort(row_id_B)]]
    np.testing.assert_allclose(one, np.concatenate([newest, bank_J])[:6], rtol=1e-6)


def test_a_batch_divided_over_devices_gives_the_bank_and_scores_of_one(model):
    model, variables, train, _ = model
    outputs, updated = train(variables, _FEATURES)
    cxr_PD = _FEATURES["cxr_features"]
    halves = {
        "ehr_features": _FEATURES["ehr_features"].reshape(2, 2, _D),
        "length": _FEATURES["length"].reshape(2, 2),
        "cxr_features": np.stack([np.stack([cxr_PD[0], np.zeros(_D)]), cxr_PD[1:]]),
        "image_row": np.array([[0, 0], [0, 1]]),
        "image_mask": np.array([[True, False], [True, True]]),
        "dropout_rows": _FEATURES["dropout_rows"].reshape(2, 2),
    }

    def apply(inputs, axis_name="device"):
        return model.apply(variables, **inputs, train=True, axis_name=axis_name, mutable=["batch_stats"])

    divided, stats = fast_jit(jax.vmap(apply, axis_name="device"))(halves)
    np.testing.assert_allclose(divided["logits"].reshape(4, -1), outputs["logits"], atol=1e-5)
    for name, stored in _bank(updated).items():
        for of_device in _bank(stats)[name]:
            np.testing.assert_allclose(of_device, stored, atol=1e-6)
    alone = fast_jit(jax.vmap(lambda inputs: apply(inputs, axis_name=None)[1]))(halves)
    assert np.abs(_bank(alone)["ehr"][0] - _bank(updated)["ehr"]).max() > 1e-2  # without the other device's rows


def test_neighbours_are_the_stored_rows_of_at_least_mean_similarity():
    similarity = jnp.array([[0.2, 0.4, 0.6, 0.9], [0.3, 0.3, 0.3, 0.9], [0.0, 0.0, 0.0, 0.0]])
    filled = jnp.array([True, True, True, False])
    expected = [[0, 0.4, 0.6, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(m3care.neighbour_weights(similarity, filled), expected, atol=1e-6)
    assert not np.any(m3care.neighbour_weights(similarity, jnp.zeros(4, bool)))


def test_a_missing_x_ray_is_filled_in_from_the_bank(model):
    _, variables, _, score = model
    base = score(variables, _FEATURES)["logits"]
    bank = variables["batch_stats"]["bank"]
    other = score(_with_bank(variables, cxr=bank["cxr"].at[:3].multiply(-2.0)), _FEATURES)["logits"]
    assert np.abs(other - base).max(axis=1).min() > 1e-4  # also where it is not missing: patients are joined
    unfilled = score(_with_bank(variables, cxr=bank["cxr"].at[3:].set(9.0)), _FEATURES)["logits"]
    np.testing.assert_array_equal(unfilled, base)
    empty = score(_with_bank(variables, filled=jnp.zeros(_J)), _FEATURES)["logits"]
    assert np.isfinite(empty).all() and np.abs(empty - base).max(axis=1).min() > 1e-4


def test_no_score_depends_on_another_row_in_training_either(model):
    _, variables, train, _ = model
    base = train(variables, _FEATURES)[0]["logits"]
    changed = {**_FEATURES, "ehr_features": _FEATURES["ehr_features"].copy()}
    changed["ehr_features"][0] += 1
    removed = {**_FEATURES, "image_row": np.array([9, 2, 3]), "image_mask": np.array([False, True, True])}
    for other in (changed, removed):
        moved_B = np.abs(train(variables, other)[0]["logits"] - base).max(axis=1)
        assert moved_B[0] > 1e-4 and not np.any(moved_B[1:])


def test_the_kernels_learn_from_the_scores(model):
    model, variables, _, _ = model

    @fast_jit
    @jax.grad
    def gradient(params):
        return model.apply({**variables, "params": params}, **_FEATURES)["logits"].sum()

    found = gradient(variables["params"])
    for name in ("ehr_kernel", "cxr_kernel", "ehr_neighbours", "cxr_neighbours", "modality", "layer", "projection"):
        assert any(np.any(leaf) for leaf in jax.tree.leaves(found[name])), name
