"""The transfer module against its formula in numpy, and the alignment loss."""

import numpy as np
import pytest
from model_cases import fast_jit

from medfuse_jax.models import mmtm
from medfuse_jax.models.presence import images_of

_B, _T, _D, _C = 3, 5, 4, 8


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _case():
    rng = np.random.default_rng(0)

    def dense(num_in, num_out):
        return {"kernel": rng.standard_normal((num_in, num_out)), "bias": rng.standard_normal(num_out)}

    params = {"squeeze": dense(_C + _D, 6), "image_gate": dense(6, _C), "ehr_gate": dense(6, _D)}
    maps_PHWC = rng.standard_normal((2, 3, 3, _C)).astype(np.float32)
    hidden_BTD = rng.standard_normal((_B, _T, _D)).astype(np.float32)
    return params, maps_PHWC, hidden_BTD, np.array([5, 2, 0])


def _expected(params, map_HWC, hidden_TD, length, activation=lambda a: np.maximum(a, 0)):
    """Return what the formula gives for one stay and its X-ray."""

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    both = np.concatenate([map_HWC.mean((0, 1)), hidden_TD[:length].mean(0)])
    squeezed = activation(dense("squeeze", both))
    return map_HWC * _sigmoid(dense("image_gate", squeezed)), hidden_TD * _sigmoid(dense("ehr_gate", squeezed))


def _run(image_row):
    params, maps_PHWC, hidden_BTD, length_B = _case()
    apply = fast_jit(
        lambda image_row: mmtm.Mmtm().apply(
            {"params": params},
            maps_PHWC,
            hidden_BTD,
            length_B,
            images_of(_B, np.ones((2, 1, 1)), image_row=image_row),
        )
    )
    return apply(np.array(image_row))


def test_gates_match_the_formula():
    params, maps_PHWC, hidden_BTD, length_B = _case()
    gated_PHWC, gated_BTD = _run([1, 0])
    for image, row in ((0, 1), (1, 0)):
        expected_HWC, expected_TD = _expected(params, maps_PHWC[image], hidden_BTD[row], length_B[row])
        np.testing.assert_allclose(gated_PHWC[image], expected_HWC, atol=1e-5)
        np.testing.assert_allclose(gated_BTD[row], expected_TD, atol=1e-5)
        linear_HWC, _ = _expected(params, maps_PHWC[image], hidden_BTD[row], length_B[row], activation=lambda a: a)
        assert np.abs(linear_HWC - expected_HWC).max() > 1e-3
    padded_HWC, _ = _expected(params, maps_PHWC[0], hidden_BTD[1], _T)  # as released: the padding counts
    assert np.abs(padded_HWC - gated_PHWC[0]).max() > 1e-3


def test_a_modality_passes_unchanged_if_the_other_is_missing():
    _, maps_PHWC, hidden_BTD, _ = _case()
    gated_PHWC, gated_BTD = _run([2, _B])  # row 2 has no stay, the second slot no X-ray
    np.testing.assert_array_equal(gated_PHWC, maps_PHWC)
    np.testing.assert_array_equal(gated_BTD[:2], hidden_BTD[:2])


def test_alignment_loss_is_the_divergence_of_two_tempered_distributions():
    rng = np.random.default_rng(0)
    cxr_BE, ehr_BE = rng.standard_normal((2, _B, 6))

    def distribution(x, temperature=0.2):
        p = np.exp(x / temperature)
        return p / p.sum(-1, keepdims=True)

    p, q = distribution(cxr_BE), distribution(ehr_BE)
    loss_B = mmtm.alignment_loss(cxr_BE, ehr_BE)
    np.testing.assert_allclose(loss_B, (p * np.log(p / q)).sum(-1), rtol=1e-4)
    assert np.abs(loss_B - (q * np.log(q / p)).sum(-1)).max() > 0.1
    assert np.all(mmtm.alignment_loss(cxr_BE, cxr_BE) == pytest.approx(0, abs=1e-6))
