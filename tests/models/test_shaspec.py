"""ShaSpec: a missing modality's feature comes from the shared encoder; what each of its losses trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import fast_jit, random_variables, tiny_model

_RNG = np.random.default_rng(0)
# Rows: both modalities; EHR; X-ray.
_FEATURES = {
    "ehr_features": _RNG.normal(size=(3, 8)).astype(np.float32) * np.array([[1], [1], [0]], np.float32),
    "length": np.array([3, 2, 0], np.int32),
    "cxr_features": _RNG.normal(size=(2, 8)).astype(np.float32),
    "image_row": np.array([0, 2]),
}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("shaspec")
    return model, random_variables(model)


def _dense(weights, x):
    return x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])


def _two_layers(weights, x):
    return _dense(weights["down"], np.maximum(_dense(weights["up"], x), 0))


def test_scores_are_those_of_the_formula(model):
    model, variables = model
    params, outputs = variables["params"], fast_jit(lambda: model.apply(variables, **_FEATURES))()
    ehr, cxr = _FEATURES["ehr_features"], _dense(params["projection"], _FEATURES["cxr_features"])

    def fused(features, specific):
        shared = _two_layers(params["shared"], features)
        both = np.concatenate([shared, _two_layers(params[specific], features)], axis=-1)
        return _dense(params["residual"], both) + shared

    ehr_fused, cxr_fused = fused(ehr, "ehr_specific"), fused(cxr, "cxr_specific")
    shared_ehr, shared_cxr = _two_layers(params["shared"], ehr), _two_layers(params["shared"], cxr)
    rows = [(ehr_fused[0], cxr_fused[0]), (ehr_fused[1], shared_ehr[1]), (shared_cxr[1], cxr_fused[1])]
    expected = _dense(params["classifier"], np.stack([np.concatenate(row) for row in rows]))
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(outputs["distance_rows"][0], np.abs(shared_ehr[0] - shared_cxr[0]).mean(), rtol=1e-5)
    domain = _dense(params["domain_classifier"], _two_layers(params["cxr_specific"], cxr))
    loss = np.log(np.exp(domain).sum(1)) - domain[:, 1]
    np.testing.assert_allclose(outputs["cxr_domain_rows"][np.array([0, 2])], loss, rtol=1e-4)
    wrong = np.log(np.exp(domain).sum(1)) - domain[:, 0]  # told to be EHR
    assert np.abs(wrong - loss).min() > 1e-2


def test_each_loss_trains_its_own_encoders(model):
    model, variables = model
    trains = {
        "logits": {"shared", "ehr_specific", "cxr_specific", "residual", "classifier", "projection"},
        "distance_rows": {"shared", "projection"},
        "ehr_domain_rows": {"ehr_specific", "domain_classifier"},
        "cxr_domain_rows": {"cxr_specific", "domain_classifier", "projection"},
    }

    @fast_jit
    def gradients(params):
        outputs, pull_back = jax.vjp(lambda params: model.apply({**variables, "params": params}, **_FEATURES), params)
        zero = jax.tree.map(jnp.zeros_like, outputs)
        return {name: pull_back({**zero, name: zero[name].at[0].set(1.0)})[0] for name in trains}

    for name, found in gradients(variables["params"]).items():
        moved = {part for part, leaves in found.items() if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))}
        assert moved == trains[name], name
