"""Hourly tasks: one causal pass over a stay gives the scores that runs on every prefix of it would give.

Shapes: B rows, T time steps, H hours, P images, R = B * H.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from model_cases import batch, fast_jit, random_variables, tiny_model

from medfuse_jax import config as config_lib
from medfuse_jax.models import registry
from medfuse_jax.models.presence import latest_slots
from medfuse_jax.runtime.errors import UserError

_ALL_IMAGES = [f"{name}, all" for name in registry.with_field("all_images")]
_TRANSFORMER = [f"{name}, transformer" for name in ("uni_ehr", "medfuse", "medfuse_attention")]
CAUSAL = [name for name, row in registry.METHODS.items() if not row.model_class.not_causal]
_STEP_BH = np.array([[1, 2, 2, 5], [1, 2, 2, 0], [2, 3, 4, 4], [1, 1, 0, 0]], np.int32)
# Row 0 has an X-ray from its second hour on, row 2 one from its first and another from its third.
_IMAGE_ROW_P, _IMAGE_HOUR_P = np.array([0, 2, 2, 0], np.int32), np.array([1, 0, 2, 0], np.int32)
_MASK_P = np.array([True, True, True, False])
_SLOT_BH = np.array([[-1, 0, 0, 0], [-1] * 4, [1, 1, 2, 2], [-1] * 4])
_IMAGE_SLOT_BM = np.array([[0, -1], [-1, -1], [1, 2], [-1, -1]], np.int32)


def _hourly(method: str = "") -> dict:
    listed = {"image_row": _IMAGE_ROW_P, "image_mask": _MASK_P, "image_hour": _IMAGE_HOUR_P, "hour_step": _STEP_BH}
    if method.endswith(", all"):
        listed |= {"image_slot": _IMAGE_SLOT_BM, "image_time_h": np.array([7, 3, 8, 0], np.float32)}
    return batch(slots=4) | listed


def _model(method: str, **options):
    name, _, variant = method.partition(", ")
    of_variant: dict = {"all": {"all_images": True}, "transformer": {"ehr_kind": "transformer"}}.get(variant, {})
    return tiny_model(name, **options, **of_variant)


@functools.cache
def _jacobian(method: str):
    """Compile (ehr, image, the other inputs) -> the gradients of each hour's scores by the first two."""
    # No gradient reaches frozen encoders, but a score depends on what they read.
    model = _model(method, **{"frozen_encoders": False} if method == "early" else {})
    variables = random_variables(model)

    def score_R(ehr, image, others):
        logits_BHK = model.apply(variables, ehr=ehr, image=image, **others, train=False)["logits"]
        return logits_BHK.sum(-1).reshape(-1)

    return fast_jit(jax.jacrev(score_R, argnums=(0, 1)))


def _gradients(method: str, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest gradients of each hour's scores by each time step [R, B, T] and each image [R, P]."""
    others = {name: x for name, x in inputs.items() if name not in ("ehr", "image")}
    by_ehr, by_image = _jacobian(method)(inputs["ehr"], inputs["image"], others)
    return np.abs(by_ehr).max(-1), np.abs(by_image).max((-1, -2))


def _assert_causal(by_ehr_RBT, by_image_RP, all_images=False):
    """Check that an hour's scores depend on exactly what was known by then, of its own stay."""
    row_R, step_R = np.repeat(np.arange(4), 4), _STEP_BH.reshape(-1)
    known_RBT = (np.arange(4) == row_R[:, None])[..., None] & (np.arange(5) < step_R[:, None, None])
    np.testing.assert_array_equal(by_ehr_RBT > 0, known_RBT)
    reads_images = by_image_RP.any()
    known_RP = _SLOT_BH.reshape(-1, 1) == np.arange(4)
    if all_images:
        hour_R = np.tile(np.arange(4), 4)
        known_RP = (row_R[:, None] == _IMAGE_ROW_P) & (hour_R[:, None] >= _IMAGE_HOUR_P) & _MASK_P
    known_RP = known_RP & reads_images
    np.testing.assert_array_equal(by_image_RP > 0, known_RP)


@pytest.mark.parametrize("method", CAUSAL + _ALL_IMAGES + _TRANSFORMER)
def test_no_score_depends_on_anything_after_its_hour(method):
    by_ehr_RBT, by_image_RP = _gradients(method, _hourly(method))
    _assert_causal(by_ehr_RBT, by_image_RP, all_images=method in _ALL_IMAGES)
    assert by_image_RP.any() == (not method.startswith("uni_ehr"))


@pytest.mark.parametrize(
    ("leak", "method"),
    [("hour_step", "medfuse"), ("image_hour", "medfuse"), ("image_hour", "medfuse_attention, all")],
)
def test_a_planted_leak_is_noticed(leak, method):
    inputs = _hourly(method)
    inputs[leak] = np.maximum(inputs[leak] + (1 if leak == "hour_step" else -1), 0)
    with pytest.raises(AssertionError):
        _assert_causal(*_gradients(method, inputs), all_images=method in _ALL_IMAGES)


@pytest.mark.parametrize("method", CAUSAL + _ALL_IMAGES + _TRANSFORMER)
def test_one_pass_gives_the_scores_of_a_run_on_each_prefix(method):
    model, inputs = _model(method), _hourly(method)
    variables = random_variables(model)
    one_pass_BHK = fast_jit(lambda: model.apply(variables, **inputs, train=False)["logits"])()
    slot_R = _SLOT_BH.reshape(-1)
    prefixes = {
        "ehr": np.repeat(inputs["ehr"], 4, axis=0),
        "length": _STEP_BH.reshape(-1),
        "image": inputs["image"][slot_R],
        "has_cxr": slot_R >= 0,
    }
    if method in _ALL_IMAGES:
        prefixes |= {name: inputs[name] for name in ("image", "image_row", "image_mask", "image_time_h")}
        hour_R1 = np.tile(np.arange(4), 4)[:, None]
        slot_RM = np.repeat(_IMAGE_SLOT_BM, 4, axis=0)
        prefixes["image_slot"] = np.where((slot_RM >= 0) & (_IMAGE_HOUR_P[slot_RM] <= hour_R1), slot_RM, -1)
    each_RK = fast_jit(lambda: model.apply(variables, **prefixes, train=False)["logits"])()
    np.testing.assert_allclose(one_pass_BHK.reshape(16, -1), each_RK, atol=1e-5)
    assert np.abs(np.diff(each_RK[:4], axis=0)).max() > 1e-3  # an hour's scores in another's place would show


def test_padding_changes_no_score():
    model, inputs = tiny_model("medfuse"), _hourly()
    variables = random_variables(model)
    apply = fast_jit(lambda inputs: model.apply(variables, **inputs, train=False)["logits"])
    expected_BHK = apply(inputs)
    inputs["ehr"][1, 2:], inputs["image"][3] = np.nan, np.nan
    np.testing.assert_array_equal(apply(inputs), expected_BHK)


def test_an_image_is_encoded_once_however_many_hours_see_it():
    model, seen = tiny_model("medfuse"), []
    inputs = {name: jnp.asarray(x) for name, x in _hourly().items()}

    def note(next_fun, args, kwargs, context):
        if context.module.name == "cxr_encoder" and context.method_name == "__call__":
            seen.append(args[0].shape[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.apply(random_variables(model), **inputs, train=False))
    assert seen and set(seen) == {4}


def test_a_row_sees_its_latest_image():
    slot_BH = latest_slots(_IMAGE_ROW_P, _IMAGE_HOUR_P, _MASK_P, _STEP_BH.shape)
    np.testing.assert_array_equal(slot_BH, _SLOT_BH)


@pytest.mark.parametrize("method", [name for name in registry.METHODS if name not in CAUSAL])
def test_a_method_that_is_not_causal_is_refused(method):
    config = config_lib.default()
    config.task, config.method = "decompensation", method
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert (caught.value.field, caught.value.value) == ("config.method", method)


def test_the_page_lists_the_causal_methods():
    page = (Path(__file__).parents[2] / "docs" / "hourly.md").read_text()
    assert re.findall(r"`(\w+)`", page.partition("\nMethods: ")[2].partition(".")[0]) == CAUSAL
    for method in CAUSAL:
        config = config_lib.default()
        config.task, config.method = "length_of_stay", method
        config_lib.validate(config)
