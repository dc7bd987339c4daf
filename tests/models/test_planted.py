"""Each method finds a label that only the X-ray shows, and keeps it from rows without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import TINIER

from medfuse_jax import augment, losses, metrics, optim
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.models import registry

_ROWS, _TIME, _IMAGES, _STEPS = 16, 3, 8, 120


def _batch(seed: int) -> dict:
    """Return rows of which the first half have an X-ray. Label 0 is its brightness, label 1 the sign of a channel."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, (_ROWS, 2))
    ehr = rng.normal(size=(_ROWS, _TIME, 76))
    ehr[:, :, 0] += 3 * (2 * label[:, 1:] - 1)
    grey = rng.integers(0, 60, (_IMAGES, 32, 32)) + 120 * label[:_IMAGES, 0, None, None]
    return {
        "label": label.astype(np.float32),
        "valid": np.ones(_ROWS, bool),
        "row_id": np.arange(_ROWS, dtype=np.int32),
        "length": np.full(_ROWS, _TIME, np.int32),
        "ehr": ehr.astype(np.float32),
        "image": grey.astype(np.uint8),
        "image_row": np.arange(_IMAGES, dtype=np.int32),
        "image_mask": np.ones(_IMAGES, bool),
    }


def _auroc(method: str, **fields) -> np.ndarray:
    """Train a tiny model; return the AUROC of both labels on new rows with an X-ray [2]."""
    still = {"flip": False, "rotation_deg": 0.0, "scale": (1.0, 1.0), "translation": 0.0}
    options = step_lib.StepOptions(
        model=registry.build(method, 2, **TINIER, dropout=0.0, **fields),
        optimizer=optim.adam(0.999),
        image=augment.ImageOptions(**config_lib.section("image", resize_px=32, crop_px=32, **still)),
        weights=losses.Weights(**config_lib.section("loss")),
        mean_F=(0.0,) * 76,
        std_F=(1.0,) * 76,
    )
    state = step_lib.state_maker(options)(jax.random.key(0, impl="rbg"), 1e-2)
    train = jax.jit(lambda state, batch: step_lib.train_step(options, state, batch, jax.random.key(1))[0])
    score = jax.jit(lambda state, batch: step_lib.eval_step(options, state, batch)[0])
    for seed in range(_STEPS):
        state = train(state, jax.tree.map(jnp.asarray, _batch(seed)))
    new = [_batch(1000 + i) for i in range(8)]
    scores = np.concatenate([np.asarray(score(state, batch))[:_IMAGES] for batch in new])
    labels = np.concatenate([batch["label"][:_IMAGES] for batch in new])
    return np.array(metrics.evaluate(labels, scores, num_bootstrap=1)["auroc"])


@pytest.mark.nightly
@pytest.mark.parametrize("fields", [{"ehr_kind": "transformer"}, {"cxr_kind": "resnet50"}])
def test_other_encoders_find_the_labels_of_their_modality(fields):
    assert _auroc("medfuse", **fields).min() > 0.85


@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("uni_ehr", "medfuse")),
        *(pytest.param(m, marks=pytest.mark.nightly) for m in ("metra", "drfuse", "shaspec", "healnet", "m3care")),
    ],
)
def test_a_label_that_only_the_x_ray_shows_is_found(method):
    """The LSTM alone is the control: it cannot find it."""
    of_image, of_ehr = _auroc(method)
    assert of_ehr > 0.9
    assert of_image < 0.7 if method == "uni_ehr" else of_image > 0.85
