"""DrFuse's losses against their formulas; what a missing modality leaves out; what each loss trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import NUM_LABELS, fast_jit, random_variables, tiny_model

from medfuse_jax.models import drfuse
from medfuse_jax.models.drfuse import DrFuse

_RNG = np.random.default_rng(0)
_A, _B = (_RNG.normal(size=(4, 6)).astype(np.float32) * 2 for _ in range(2))
# Rows: both modalities; EHR; X-ray; neither.
_FEATURES = {
    "ehr_features": _RNG.normal(size=(4, 8)).astype(np.float32) * np.array([[1], [1], [0], [0]], np.float32),
    "length": np.array([3, 2, 0, 0], np.int32),
    "cxr_features": _RNG.normal(size=(2, 8)).astype(np.float32),
    "image_row": np.array([0, 2]),
}


def _sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def test_the_pooled_log_odds_are_those_of_the_mean_probability():
    pooled = drfuse.log_odds_of_mean(_A, _B)
    np.testing.assert_allclose(_sigmoid(np.asarray(pooled)), (_sigmoid(_A) + _sigmoid(_B)) / 2, atol=1e-6)
    assert np.abs(np.asarray(pooled) - (_A + _B) / 2).max() > 0.1  # the mean of the log-odds would show
    extreme = jnp.array([80.0, -80.0, 80.0])
    assert np.isfinite(drfuse.log_odds_of_mean(extreme, -extreme)).all()


def test_the_divergence_is_that_of_two_coins():
    p, q = _sigmoid(_A), _sigmoid(_B)

    def kl(p, q):
        return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))

    expected = (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)).mean(1) / 2
    np.testing.assert_allclose(drfuse.divergence(_A, _B), expected, rtol=1e-5)
    np.testing.assert_allclose(drfuse.divergence(_A, _A), 0, atol=1e-6)
    assert np.abs(kl(p, q).mean(1) - expected).min() > 1e-2  # the divergence to the other, not to the mean


def test_the_cosine_ignores_sign_and_length_and_is_0_without_features():
    expected = np.abs((_A * _B).sum(1)) / np.linalg.norm(_A, axis=1) / np.linalg.norm(_B, axis=1)
    np.testing.assert_allclose(drfuse.cosine(_A, -3 * _B), expected, rtol=1e-5)
    gradient = jax.grad(lambda a: drfuse.cosine(a, _B).sum())(np.zeros_like(_A))
    assert np.isfinite(gradient).all() and not np.any(drfuse.cosine(np.zeros_like(_A), _B))


def test_the_ranking_loss_asks_for_attention_where_the_classifier_is_better():
    # For a positive label: the EHR's classifier is best, then that of the shared features, then the X-ray's.
    logits = {"ehr_only_logits": 2.0, "shared_only_logits": 1.0, "cxr_only_logits": 0.0}
    outputs = {name: jnp.full((1, 1), value) for name, value in logits.items()}
    outputs["attention"] = jnp.array([[[0.5, 0.3, 0.2]]])
    np.testing.assert_allclose(drfuse.ranking_loss(outputs, jnp.ones((1, 1))), 0, atol=1e-7)
    outputs["attention"] = jnp.array([[[0.2, 0.25, 0.55]]])
    wrong = (0.1 + 0.05) + (0.1 + 0.35) + (0.1 + 0.3)
    ranking = drfuse.ranking_loss(outputs, jnp.ones((1, 1)))
    np.testing.assert_allclose(ranking, [wrong / 3], rtol=1e-5)
    assert drfuse.ranking_loss(outputs, jnp.zeros((1, 1)))[0] < wrong / 6  # the other way round for a negative label
    gradient = jax.grad(lambda outputs: drfuse.ranking_loss(outputs, jnp.ones((1, 1))).sum())(outputs)
    assert np.any(gradient.pop("attention")) and not any(np.any(leaf) for leaf in gradient.values())


@pytest.fixture(scope="module")
def model():
    model = tiny_model("drfuse")
    return model, random_variables(model)


def test_a_missing_modality_leaves_the_attention_and_the_shared_features_to_the_other(model):
    model, variables = model
    apply = fast_jit(lambda inputs: model.apply(variables, **inputs))
    outputs = apply(_FEATURES)
    attention_BKR = np.asarray(outputs["attention"])
    there_BR = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(attention_BKR > 0, np.repeat(there_BR[:, None], NUM_LABELS, axis=1))
    np.testing.assert_allclose(
        attention_BKR.sum(-1), np.repeat(there_BR.any(1)[:, None], NUM_LABELS, axis=1), atol=1e-6
    )
    np.testing.assert_allclose(outputs["logits"][3], variables["params"]["bias"], atol=1e-6)
    without = apply({**_FEATURES, "image_row": np.array([4, 2]), "image_mask": np.array([False, True])})
    np.testing.assert_array_equal(without["logits"][1:], outputs["logits"][1:])
    assert np.abs(without["shared_only_logits"][0] - outputs["shared_only_logits"][0]).max() > 1e-3
    np.testing.assert_array_equal(without["ehr_only_logits"], outputs["ehr_only_logits"])


_SHARED, _DISTINCT = ["ehr_shared", "cxr_shared"], ["ehr_distinct", "cxr_distinct"]
_TRAINS = {
    "ehr_only_logits": {"ehr_distinct", "ehr_classifier"},
    "shared_only_logits": {*_SHARED, "shared_classifier"},
    "cxr_only_logits": {"cxr_distinct", "cxr_classifier", "projection"},
    "divergence_rows": {*_SHARED},
    "ehr_cosine_rows": {"ehr_shared", "ehr_distinct"},
    "cxr_cosine_rows": {"cxr_shared", "cxr_distinct", "projection"},
    "logits": {*_SHARED, *_DISTINCT, "projection", "query", "key", "value", "kernel", "bias"},
}


def test_each_loss_trains_its_own_branches(model):
    model, variables = model

    @fast_jit
    def gradients(params):
        outputs, pull_back = jax.vjp(lambda params: model.apply({**variables, "params": params}, **_FEATURES), params)
        zero = jax.tree.map(jnp.zeros_like, outputs)
        # Only the rows that the losses count: those with both modalities.
        return {name: pull_back({**zero, name: zero[name].at[0].set(1.0)})[0] for name in _TRAINS}

    for name, found in gradients(variables["params"]).items():
        moved = {part for part, leaves in found.items() if any(np.any(leaf) for leaf in jax.tree.leaves(leaves))}
        assert moved - {"projection"} == _TRAINS[name] - {"projection"}, name
        assert ("projection" in moved) == ("projection" in _TRAINS[name] or bool({"cxr_shared"} & _TRAINS[name])), name


def test_every_loss_of_the_model_has_a_weight_and_rows():
    assert DrFuse.loss_weights() == {"ehr_only", "cxr_only", "shared_only", "divergence", "orthogonal", "ranking"}
