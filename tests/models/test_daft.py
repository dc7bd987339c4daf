"""The affine transform against its formula in numpy."""

import numpy as np
from model_cases import fast_jit

from medfuse_jax.models import daft
from medfuse_jax.models.presence import images_of

_B, _T, _D, _C = 3, 5, 4, 12


def _case():
    rng = np.random.default_rng(0)
    bottleneck = 4  # int((16 + 12) / 7)
    params = {
        "squeeze": {"kernel": rng.standard_normal((_C + _D, bottleneck)).astype(np.float32)},
        "excite": {"kernel": rng.standard_normal((bottleneck, 2 * _D)).astype(np.float32)},
    }
    image_PC = rng.standard_normal((2, _C)).astype(np.float32)
    hidden_BTD = rng.standard_normal((_B, _T, _D)).astype(np.float32)
    return params, image_PC, hidden_BTD, np.array([5, 2, 3])


def test_scale_and_shift_match_the_formula():
    params, image_PC, hidden_BTD, length_B = _case()
    images = images_of(_B, np.ones((2, 1, 1)), image_row=np.array([1, 0]))
    got_BTD = fast_jit(lambda image_PC: daft.Daft().apply({"params": params}, image_PC, hidden_BTD, length_B, images))(
        image_PC
    )
    for image, row in ((0, 1), (1, 0)):
        both = np.concatenate([image_PC[image], hidden_BTD[row, : length_B[row]].mean(0)])
        affine = np.maximum(both @ params["squeeze"]["kernel"], 0) @ params["excite"]["kernel"]
        scale, shift = affine[:_D], affine[_D:]
        np.testing.assert_allclose(got_BTD[row], hidden_BTD[row] * scale + shift, atol=1e-4)
        assert np.abs(got_BTD[row] - (hidden_BTD[row] * shift + scale)).max() > 0.1
        assert np.abs(got_BTD[row] - (hidden_BTD[row] * (1 + scale) + shift)).max() > 0.1
    np.testing.assert_array_equal(got_BTD[2], hidden_BTD[2])  # no X-ray
