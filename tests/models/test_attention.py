"""Attention weights sum to 1 over what is present, are 0 elsewhere, and do not depend on anything absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import batch, fast_jit, random_variables, tiny_model

from medfuse_jax.models import attention

_time = attention.TimeAttention()
_fusion = attention.AttentionFusion(width=6)


def _random(module, *inputs, seed: int = 0) -> dict:
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), made)


def _stays(num_steps: int = 7):
    rng = np.random.default_rng(1)
    hidden_BTD = rng.normal(size=(4, 7, 5)).astype(np.float32)[:, :num_steps]
    return hidden_BTD, rng.normal(size=(4, 5)).astype(np.float32), np.array([5, 1, 0, 3], np.int32)


def test_masked_softmax_equals_the_softmax_of_the_unmasked_values():
    score_BM = np.array([[1.0, 2, 3], [1, np.nan, 3], [5, 5, 5], [1e4, -1e4, 0]], np.float32)
    mask_BM = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    weight_BM = attention.masked_softmax(score_BM, mask_BM)
    np.testing.assert_allclose(weight_BM[0], jax.nn.softmax(score_BM[0]), rtol=1e-6)
    np.testing.assert_allclose(weight_BM[1, [0, 2]], jax.nn.softmax(score_BM[1, [0, 2]]), rtol=1e-6)
    np.testing.assert_array_equal(weight_BM[1:3, 1], 0)
    np.testing.assert_array_equal(weight_BM[2:], [[0, 0, 0], [1, 0, 0]])
    gradient = jax.grad(lambda s: jnp.sum(jnp.square(attention.masked_softmax(s, mask_BM))))(score_BM)
    assert np.isfinite(gradient).all() and not gradient[~mask_BM].any()


def test_time_weights_sum_to_one_and_padding_changes_nothing():
    hidden_BTD, last_BD, length_B = _stays()
    variables = _random(_time, hidden_BTD, last_BD, length_B)
    run = fast_jit(_time.apply)
    pooled_BD, weight_BT = run(variables, hidden_BTD, last_BD, length_B)
    inside_BT = np.arange(7) < length_B[:, None]
    np.testing.assert_allclose(weight_BT.sum(1), [1, 1, 0, 1], atol=1e-6)
    assert not weight_BT[~inside_BT].any() and (weight_BT[inside_BT] > 0).all()
    np.testing.assert_allclose(pooled_BD, np.einsum("bt,btd->bd", weight_BT, hidden_BTD), atol=1e-6)
    assert not pooled_BD[2].any()
    poisoned = np.where(inside_BT[..., None], hidden_BTD, np.nan).astype(np.float32)
    jax.tree.map(np.testing.assert_array_equal, run(variables, poisoned, last_BD, length_B), (pooled_BD, weight_BT))
    shorter = _time.apply(variables, _stays(5)[0], last_BD, length_B)  # another bucket
    np.testing.assert_allclose(shorter[1], weight_BT[:, :5], atol=1e-6)
    # the mask matters: a step too many would show
    assert np.abs(run(variables, hidden_BTD, last_BD, length_B + 1)[0] - pooled_BD).max(1).min() > 1e-3


def test_time_weights_depend_on_the_last_state():
    hidden_BTD, last_BD, length_B = _stays()
    variables = _random(_time, hidden_BTD, last_BD, length_B)
    a, b = (_time.apply(variables, hidden_BTD, x, length_B)[1] for x in (last_BD, last_BD + 1))
    assert np.abs(a - b)[[0, 3]].max(1).min() > 1e-3


def _tokens():
    token_BMD = np.random.default_rng(2).normal(size=(4, 3, 5)).astype(np.float32)
    return token_BMD, np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)


def test_modality_weights_sum_to_one_and_a_masked_token_changes_nothing():
    token_BMD, mask_BM = _tokens()
    variables = _random(_fusion, token_BMD, mask_BM)

    @fast_jit
    def run(variables, token_BMD):
        def total(variables, token_BMD):
            out = _fusion.apply(variables, token_BMD, mask_BM)
            return jnp.sum(jnp.sin(out[0])), out

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(variables, token_BMD)

    clean = run(variables, token_BMD)
    poisoned = run(variables, np.where(mask_BM[..., None], token_BMD, np.nan).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    (_, (fused_BN, weight_BM)), (_, token_gradient_BMD) = poisoned
    np.testing.assert_allclose(weight_BM.sum(1), [1, 1, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(weight_BM > 0, mask_BM)
    assert weight_BM[2, 1] == 1 and not fused_BN[3].any()
    assert not token_gradient_BMD[~mask_BM].any() and np.any(token_gradient_BMD[:2], axis=2).sum() == 5
    unmasked = _fusion.apply(variables, token_BMD, np.ones_like(mask_BM))[0]
    assert np.abs(unmasked - fused_BN)[1:].max(1).min() > 1e-3


def test_a_token_place_that_is_never_filled_gets_no_gradient():
    token_BMD, mask_BM = _tokens()
    variables = _random(_fusion, token_BMD, mask_BM)
    mask_BM = mask_BM & np.array([True, True, False])
    found = jax.grad(lambda v: jnp.sum(jnp.sin(_fusion.apply(v, token_BMD, mask_BM)[0])))(variables)["params"]
    for name in ("key_kernel", "key_bias", "value_kernel", "value_bias"):
        assert not np.any(found[name][2]) and np.any(found[name][0])


def test_initial_weights_are_uniform():
    hidden_BTD, last_BD, length_B = _stays()
    weight_BT = _time.apply(_time.init(jax.random.key(0), hidden_BTD, last_BD, length_B), *_stays())[1]
    np.testing.assert_allclose(weight_BT[0, :5], 0.2, rtol=1e-6)
    token_BMD, mask_BM = _tokens()
    weight_BM = _fusion.apply(_fusion.init(jax.random.key(0), token_BMD, mask_BM), token_BMD, mask_BM)[1]
    np.testing.assert_allclose(weight_BM[0], 1 / 3, rtol=1e-6)


@pytest.fixture(scope="module")
def weigh():
    model = tiny_model("medfuse_attention")
    variables = random_variables(model)
    apply = fast_jit(lambda given: model.apply(variables, **given, mutable=["intermediates"])[1]["intermediates"])
    return lambda given: jax.tree.map(np.asarray, apply(given))


def test_a_models_weights_cover_what_each_row_has(weigh):
    given = {**batch(), "length": np.array([0, 2, 4, 1], np.int32)}  # X-ray; stay; both; stay
    weights = weigh(given)
    np.testing.assert_array_equal(weights["modality_weights"] > 0, [[0, 1], [1, 0], [1, 1], [1, 0]])
    np.testing.assert_allclose(weights["modality_weights"].sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal((weights["time_weights"] > 0).sum(1), given["length"])


def test_a_missing_x_ray_changes_no_weight_of_another_row(weigh):
    before = batch()
    after = weigh({**before, "image_mask": np.array([False, True, False])})  # row 2's X-ray
    before = weigh(before)
    np.testing.assert_array_equal(after["time_weights"], before["time_weights"])
    changed_B = (after["modality_weights"] != before["modality_weights"]).any(1)
    np.testing.assert_array_equal(changed_B, [False, False, True, False])


def test_a_single_position_has_all_weight_and_no_gradient():
    mask = np.array([[True, False], [True, True]])
    weight, pull_back = jax.vjp(
        lambda score: attention.masked_softmax(score, mask), jnp.array([[2.0, 9.0], [1.0, 0.0]])
    )
    np.testing.assert_array_equal(weight[0], [1, 0])
    (gradient,) = pull_back(jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    assert not np.any(gradient[0]) and np.all(gradient[1] != 0)
