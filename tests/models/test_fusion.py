"""Fusion over modality tokens: a missing token changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import fast_jit

from medfuse_jax.models import fusion

_fusion = fusion.LstmFusion(width=6)


def _case(num_tokens: int = 3):
    rng = np.random.default_rng(0)
    token_BMD = rng.standard_normal((4, num_tokens, 5)).astype(np.float32)
    cell = {
        "input_kernel": rng.standard_normal((5, 24)).astype(np.float32),
        "recurrent_kernel": rng.standard_normal((6, 24)).astype(np.float32),
        "bias": rng.standard_normal(24).astype(np.float32),
    }
    return {"params": {"cell": cell}}, token_BMD


_fuse = fast_jit(_fusion.apply)


def test_a_missing_token_equals_a_sequence_without_it():
    variables, token_BMD = _case()
    mask_BM = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    fused_BN = _fuse(variables, token_BMD, mask_BM)
    for row, mask_M in enumerate(mask_BM):
        kept_BMD = token_BMD[row : row + 1, mask_M]
        alone_BN = _fuse(variables, kept_BMD, np.ones((1, mask_M.sum()), bool))
        np.testing.assert_allclose(fused_BN[row], alone_BN[0], atol=1e-6)
    assert not np.any(fused_BN[3])
    # without the mask the same tokens give another result
    assert np.abs(fused_BN - _fuse(variables, token_BMD, np.ones((4, 3), bool)))[1:].max(1).min() > 1e-2


def test_nan_in_a_missing_token_affects_nothing():
    variables, token_BMD = _case()
    mask_BM = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], bool)
    run = fast_jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(_fusion.apply(v, x, mask_BM))), argnums=(0, 1)))
    clean = run(variables, token_BMD)
    poisoned = run(variables, np.where(mask_BM[..., None], token_BMD, np.nan).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    token_gradient_BMD = poisoned[1][1]
    np.testing.assert_array_equal(np.any(token_gradient_BMD, axis=-1), mask_BM)


def test_token_order_matters_and_a_modality_adds_one_token():
    variables, token_BMD = _case()
    full_BM = np.ones((4, 3), bool)
    forward, backward = _fuse(variables, token_BMD, full_BM), _fuse(variables, token_BMD[:, ::-1], full_BM)
    assert np.abs(forward - backward).max() > 1e-2
    present_B = np.array([True, False, True, False])
    tokens = [(token_BMD[:, m], present_B if m == 2 else np.ones(4, bool)) for m in range(3)]
    stacked_BMD, mask_BM = fusion.stack_tokens(tokens)
    np.testing.assert_array_equal(stacked_BMD, token_BMD)
    three, two = _fuse(variables, stacked_BMD, mask_BM), _fuse(variables, token_BMD[:, :2], full_BM[:, :2])
    np.testing.assert_allclose(three[~present_B], two[~present_B], atol=1e-6)
    assert np.abs(three - two)[present_B].min(axis=1).max() > 1e-3
