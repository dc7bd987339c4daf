"""The peers' augmentation is ours: the same pixels from the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax import augment
from medfuse_jax.models import resnet

torch = pytest.importorskip("torch", reason="the peers need torch: pip install '.[torch]'")
torch_augment = pytest.importorskip("medfuse_jax.bench.torch_augment")

_TOLERANCE = 1e-4


@pytest.mark.parametrize("resize_px", [48, 40])
def test_augmented_as_ours_with_the_same_numbers(resize_px, monkeypatch):
    options = augment.ImageOptions(
        resize_px=resize_px, crop_px=32, crop="random", flip=True, rotation_deg=45.0, scale=(0.8, 1.2), translation=0.1
    )
    image_PSS = np.random.default_rng(0).integers(0, 256, (6, 48, 48), np.uint8)
    key, image_id_P = jax.random.key(3), jnp.arange(6)
    ours_PCC = np.asarray(augment.prepare_augmented(key, image_id_P, jnp.asarray(image_PSS), options))[..., 0]
    u_P7 = np.array(jnp.stack([jax.random.uniform(jax.random.fold_in(key, i), (7,)) for i in image_id_P]))
    assert len(set(u_P7[:, 4] < 0.5)) == 2, "some are flipped"
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.tensor(u_P7, device=device))
    theirs_P3CC = torch_augment.augment(torch.tensor(image_PSS), options).numpy()
    mean_3, std_3 = np.array(resnet.IMAGENET_MEAN), np.array(resnet.IMAGENET_STD)
    theirs_PCC3 = theirs_P3CC.transpose(0, 2, 3, 1) * std_3 + mean_3
    np.testing.assert_allclose(theirs_PCC3, np.repeat(ours_PCC[..., None], 3, -1), atol=_TOLERANCE)
    u_P7[:, 0] += 0.01  # half a degree
    wrong_P3CC = torch_augment.augment(torch.tensor(image_PSS), options).numpy()
    assert np.abs(wrong_P3CC - theirs_P3CC).max() > 10 * _TOLERANCE
