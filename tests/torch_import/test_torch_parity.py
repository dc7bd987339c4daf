"""Parity with the released models: their outputs and one training step, each shown to notice planted errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from model_cases import (
    fast_jit,
    reference_module,
    reference_outputs,
    reference_shapes,
    reference_state_dict,
)

from medfuse_jax import torch_import
from medfuse_jax.models import batch_norm, ehr_encoder, resnet

TOLERANCE = 1e-4  # of the contract, in float32

# case of the reference -> (method, labels, whether every row has its X-ray)
_CASES = {
    "uni_ehr": ("uni_ehr", 25, True),
    "uni_cxr": ("uni_cxr", 14, True),
    "joint_paired": ("joint", 25, True),
    "joint_zeros": ("joint_zeros", 25, False),
    "joint_learnable": ("joint_learnable", 25, False),
    "medfuse": ("medfuse", 25, False),
    "mortality": ("medfuse", 1, False),
    "mmtm3": ("mmtm3", 25, True),
    "mmtm4": ("mmtm4", 25, True),
    "daft3": ("daft3", 25, True),
    "daft4": ("daft4", 25, True),
}
_ALIKE = ("joint_paired", "joint_zeros", "mortality", "mmtm3", "daft4")  # each differs from another case in one value
_OUTPUT_NAMES = {"ehr_feats": "ehr_features", "cxr_feats": "cxr_features"}


@functools.cache
def _apply(model):
    return fast_jit(lambda variables, **batch: model.apply(variables, **batch, train=False))


def _outputs(real_data, case: str) -> dict:
    method, num_labels, all_paired = _CASES[case]
    model, variables = torch_import.load(reference_state_dict(real_data, case), method, num_labels)
    equal_lengths = method[:4] in ("mmtm", "daft")
    ehr, length, image, paired, _ = reference_module(real_data).inputs(seed=100, full=equal_lengths)
    has_cxr = np.ones_like(paired) if all_paired else paired
    outputs = _apply(model)(variables, ehr=ehr, length=length, image=image, has_cxr=has_cxr)
    return {**outputs, "probs": jax.nn.sigmoid(outputs["logits"])}


def _worst(real_data, case: str) -> dict[str, float]:
    """Return {name: largest deviation from the released model's output}."""
    ours, released = _outputs(real_data, case), reference_outputs(real_data, case)
    assert released, f"the reference has no case {case}"
    return {name: float(np.abs(ours[_OUTPUT_NAMES.get(name, name)] - x).max()) for name, x in released.items()}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in _ALIKE else c for c in _CASES])
def test_outputs_equal_the_released_models(real_data, case):
    worst = _worst(real_data, case)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", _CASES)
def test_released_checkpoint_is_split_into_needed_and_unused_entries(real_data, case):
    state_dict = reference_shapes(real_data, case)  # the names matter here
    method, _, _ = _CASES[case]
    needed = {name for row in torch_import.table(method) for name in row.names}
    unused = torch_import.unused(state_dict, method)
    assert len(needed) + len(unused) == len(state_dict) and needed.isdisjoint(unused)
    assert set(unused) <= torch_import.known_names()


def _swap_gates(monkeypatch):
    split = jax.numpy.split

    def swapped(gates, parts, axis):
        i, f, g, o = split(gates, parts, axis=axis)
        return i, f, o, g

    monkeypatch.setattr(ehr_encoder.jnp, "split", swapped)


def _same_padding(monkeypatch):
    def conv(ops, x, kernel, stride, padding):
        return jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    monkeypatch.setattr(resnet, "_conv", conv)


def _another_epsilon(monkeypatch):
    monkeypatch.setattr(batch_norm, "EPSILON", 1e-3)


@pytest.mark.parametrize(
    ("case", "plant"),
    [("uni_ehr", _swap_gates), ("uni_cxr", _same_padding), ("uni_cxr", _another_epsilon)],
)
def test_parity_notices_a_planted_error(real_data, monkeypatch, case, plant):
    plant(monkeypatch)
    _apply.cache_clear()
    try:
        assert max(_worst(real_data, case).values()) > 5 * TOLERANCE
    finally:
        _apply.cache_clear()


# Largest deviations of one training step: relative ones, but for the stem's running mean.
_STEP_TOLERANCES = {"loss": 1e-3, "gradient norms": 1e-3, "stem mean": 1e-5, "stem variance": 1e-4}


@functools.cache
def _training_step(model):
    """Return two functions, for ((loss, batch_stats), gradients) and for the stem's statistics, which compiles fast."""

    def loss(params, batch_stats, batch, labels):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, **batch, train=True, mutable=["batch_stats"]
        )
        return optax.sigmoid_binary_cross_entropy(outputs["logits"], labels).mean(), updated["batch_stats"]

    # Not fast_jit: without vectorised sums the gradients of the first stage's biases are off by 5e-4.
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step, jax.jit(lambda *args: loss(*args)[1]["cxr_encoder"]["stem_norm"])


@pytest.fixture(scope="module")
def released_medfuse(real_data):
    return torch_import.load(reference_state_dict(real_data, "medfuse"), "medfuse", 25, dropout=0.0)


def _step_inputs(real_data, released_medfuse, plant=None):
    model, variables = released_medfuse
    variables = jax.tree.map(lambda x: x, variables)  # new dicts, which `plant` may change
    ehr, length, image, _, labels = reference_module(real_data).inputs(seed=100)
    batch = {"ehr": ehr, "length": length, "image": image}
    if plant:
        plant(variables, batch, labels)
    return model, (variables["params"], variables["batch_stats"], batch, labels)


def _stem_deviations(released, stem) -> dict[str, float]:
    return {
        "stem mean": np.abs(stem["mean"] - released["bn1_running_mean"]).max(),
        "stem variance": np.abs(stem["var"] / released["bn1_running_var"] - 1).max(),
    }


def _step_deviations(real_data, model, inputs) -> dict[str, float]:
    """Return how far one paired training step, without dropout, is from the released model's."""
    (value, stats), gradients = _training_step(model)[0](*inputs)
    released = reference_outputs(real_data, "train_paired")
    flat = {("params", *path): leaf for path, leaf in traverse_util.flatten_dict(gradients).items()}
    paths = {name: row.path for row in torch_import.table("medfuse") for name in row.names}
    norms = {name.removeprefix("gradnorm/"): x for name, x in released.items() if name.startswith("gradnorm/")}
    assert set(norms) == {name for name, path in paths.items() if path[0] == "params"}
    return {
        "loss": abs(value / released["loss"] - 1),
        "gradient norms": max(abs(np.linalg.norm(np.ravel(flat[paths[name]])) / norms[name] - 1) for name in norms),
        **_stem_deviations(released, stats["cxr_encoder"]["stem_norm"]),
    }


def test_one_paired_training_step_equals_the_released_models(real_data, released_medfuse):
    """Loss, gradient norms and batch statistics, all rows paired."""
    deviations = _step_deviations(real_data, *_step_inputs(real_data, released_medfuse))
    assert all(deviations[name] < tolerance for name, tolerance in _STEP_TOLERANCES.items()), deviations


def _halve_a_bias(variables, batch, labels):
    cell = variables["params"]["fusion_lstm"]["cell"]
    cell["bias"] = cell["bias"] / 2


def _flip_a_label(variables, batch, labels):
    labels[0, 0] = 1 - labels[0, 0]


def _shift_images_by_a_grey_level(variables, batch, labels):
    batch["image"] = batch["image"] + 1 / 255 / 0.229  # ImageNet's standardisation


def _scale_images_as_another_channel(variables, batch, labels):
    batch["image"] = batch["image"] * (0.229 / 0.225)  # ImageNet's red and blue


def _swap_gates_of_one_kernel(variables, batch, labels):
    layer = variables["params"]["ehr_encoder"]["layer1"]
    i, f, g, o = jnp.split(layer["recurrent_kernel"], 4, axis=-1)
    layer["recurrent_kernel"] = jnp.concatenate([i, f, o, g], axis=-1)


@pytest.mark.parametrize(
    ("plant", "noticed_by"),
    [
        (_halve_a_bias, ["loss", "gradient norms"]),
        (_flip_a_label, ["gradient norms"]),
        (_swap_gates_of_one_kernel, ["gradient norms"]),
    ],
)
def test_training_step_notices_a_planted_error(real_data, released_medfuse, plant, noticed_by):
    deviations = _step_deviations(real_data, *_step_inputs(real_data, released_medfuse, plant))
    assert all(deviations[name] > 2 * _STEP_TOLERANCES[name] for name in noticed_by), deviations


@pytest.mark.parametrize(
    ("plant", "noticed_by"),
    [
        (lambda *_: None, []),
        (_scale_images_as_another_channel, ["stem variance"]),
        (_shift_images_by_a_grey_level, ["stem mean"]),
    ],
)
def test_stem_statistics_notice_planted_errors_in_images(real_data, released_medfuse, plant, noticed_by):
    model, inputs = _step_inputs(real_data, released_medfuse, plant)
    stem = _training_step(model)[1](*inputs)
    deviations = _stem_deviations(reference_outputs(real_data, "train_paired"), stem)
    assert all(deviations[name] > 2 * _STEP_TOLERANCES[name] for name in noticed_by), deviations
    assert noticed_by or all(value < _STEP_TOLERANCES[name] for name, value in deviations.items())
