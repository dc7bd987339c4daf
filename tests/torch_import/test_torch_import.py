"""Released weights: the table of names, what is refused, and parity with the released models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from model_cases import (
    NUM_LABELS,
    TINY,
    fast_jit,
    random_variables,
    reference_module,
    reference_outputs,
    reference_shapes,
    reference_state_dict,
)

from medfuse_jax import torch_import
from medfuse_jax.models import ehr_encoder, registry, resnet
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import released_methods

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
_OUTPUT_NAMES = {"ehr_feats": "ehr_features", "cxr_feats": "cxr_features"}


def _tiny(method: str):
    model = registry.build(method, NUM_LABELS, **TINY)
    return model, random_variables(model)


def _tiny_state_dict(method: str = "medfuse") -> dict:
    return torch_import.export(_tiny(method)[1], method)


def _load_tiny(state_dict: dict, method: str = "medfuse", num_labels: int = NUM_LABELS):
    return torch_import.load(state_dict, method, num_labels, **TINY)


def _assert_same_bits(a, b):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_names_of_a_data_parallel_model_are_read_and_a_mix_is_named():
    state_dict = _tiny_state_dict()
    wrapped = {f"module.{name}": value for name, value in state_dict.items()}
    jax.tree.map(_assert_same_bits, _load_tiny(wrapped)[1], _load_tiny(state_dict)[1])
    mixed = {**state_dict, **dict(list(wrapped.items())[:1])}
    with pytest.raises(UserError, match=r"has names with 'module\.' before them \(module\.\S+\) and without") as caught:
        _load_tiny(mixed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", released_methods())
def test_export_and_load_are_inverse_to_the_bit(method):
    model, variables = _tiny(method)
    variables = jax.tree.map(lambda x: x.at[..., :2].set(jnp.array([-0.0, 0.0])), variables)  # the two zeros, too
    state_dict = torch_import.export(variables, method)
    loaded_model, loaded = _load_tiny(state_dict, method)
    assert loaded_model == model
    jax.tree.map(_assert_same_bits, loaded, variables)
    assert {v.dtype for v in state_dict.values()} <= {np.dtype("float32"), np.dtype("int64")}


@pytest.mark.parametrize(
    ("method", "missing"), [("early", "learnt"), ("joint_learnable", "zeros"), ("joint", "learnt")]
)
def test_what_stands_for_a_missing_image_is_the_models_not_the_names(method, missing):
    """config.model.missing_cxr: a learnt vector is exported and read back, and asked for nowhere else."""
    options = {**TINY, "missing": missing}
    variables = random_variables(registry.build(method, NUM_LABELS, **options))
    state_dict = torch_import.export(variables, method)
    assert ("missing_token" in state_dict) == (missing == "learnt")
    _, loaded = torch_import.load(state_dict, method, NUM_LABELS, **options)
    jax.tree.map(_assert_same_bits, loaded, variables)
    token = {"missing_token": np.zeros(8, np.float32)}
    unread = torch_import.unused({**state_dict, **token}, method, TINY["resnet_stage_sizes"], missing)
    assert ("missing_token" in unread) == (missing == "zeros")


def test_a_variable_without_a_released_name_is_not_left_out_in_silence():
    _, variables = _tiny("medfuse")
    variables["params"]["notes_encoder"] = {"kernel": np.zeros((3, 8), np.float32)}
    with pytest.raises(
        UserError, match=r"hold params/notes_encoder/kernel, which a released medfuse has not"
    ) as caught:
        torch_import.export(variables, "medfuse")
    assert "\n" not in str(caught.value)


def test_a_method_that_was_never_released_is_told_so():
    state_dict = _tiny_state_dict()
    for use in (
        lambda: _load_tiny(state_dict, "medfuse_attention"),
        lambda: torch_import.export({"params": {}}, "medfuse_attention"),
    ):
        with pytest.raises(UserError, match="the released models have no method 'medfuse_attention'") as caught:
            use()
        assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("method", released_methods())
def test_each_name_and_each_variable_is_in_the_table_once(method):
    rows = torch_import.table(method)
    names = [name for row in rows for name in row.names]
    paths = [row.path for row in rows]
    assert len(set(names)) == len(names) and len(set(paths)) == len(paths)


def test_layouts_are_torchs():
    state_dict = _tiny_state_dict()
    assert state_dict["ehr_model.layer0.weight_ih_l0"].shape == (4 * 8, 76)
    assert state_dict["cxr_model.vision_backbone.conv1.weight"].shape == (4, 3, 7, 7)
    assert state_dict["cxr_model.vision_backbone.layer2.0.downsample.0.weight"].shape == (8, 4, 1, 1)
    _, variables = _load_tiny(state_dict)
    kernel = variables["params"]["cxr_encoder"]["stem_conv"]["kernel"]
    assert kernel[2, 5, 1, 3] == state_dict["cxr_model.vision_backbone.conv1.weight"][3, 1, 2, 5]


def test_the_two_biases_are_added():
    state_dict = _tiny_state_dict()
    first, second = "ehr_model.layer1.bias_ih_l0", "ehr_model.layer1.bias_hh_l0"
    state_dict[second] = np.arange(32, dtype=np.float32)
    _, variables = _load_tiny(state_dict)
    bias = variables["params"]["ehr_encoder"]["layer1"]["bias"]
    np.testing.assert_allclose(bias, state_dict[first] + state_dict[second], rtol=1e-6)


def test_parts_of_other_methods_are_allowed_and_listed():
    state_dict = _tiny_state_dict()
    more = {"fused_cls.0.weight": np.zeros((3, 16), np.float32), "cls_token": np.zeros(8, np.float32)}
    more["ehr_model.dense_layer.bias"] = np.full(3, np.nan, np.float32)  # not read, so not judged
    _load_tiny({**state_dict, **more})
    listed = torch_import.unused({**state_dict, **more}, "medfuse", TINY["resnet_stage_sizes"])
    assert [name for name in listed if "num_batches_tracked" not in name] == list(more)


def _without(name):
    return lambda state_dict: {n: v for n, v in state_dict.items() if n != name}


def _with(name, value):
    return lambda state_dict: {**state_dict, name: value}


_NAN = np.full((8, 32), np.nan, np.float32)
_STEM = "cxr_model.vision_backbone.bn1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("projection.weight"), r"lacks projection\.weight, which medfuse needs"),
        (_with("projektion.weight", np.zeros(3)), r"holds projektion\.weight, which no released model has"),
        (
            _with("projection.weight", np.zeros((8, 31))),
            r"projection\.weight has shape \[8, 31\]; \[8, 32\] was expected",
        ),
        (_with("projection.weight", np.zeros((32, 8))), r"projection\.weight has shape \[32, 8\]; \[8, 32\]"),
        (_with("projection.weight", np.zeros((8, 32), np.int64)), r"projection\.weight holds int64 numbers; floating"),
        (_with("projection.weight", np.full((8, 32), 1e300)), r"projection\.weight holds 256 value\(s\) that are not"),
        (_with(f"{_STEM}.running_var", -np.ones(4)), r"bn1\.running_var holds 4 value\(s\) below 0; variances"),
        (lambda _: {"conv1.weight": np.zeros(3)}, r"lacks .* which medfuse needs; it is a bare ResNet"),
        (_with("projection.weight", _NAN), r"projection\.weight holds 256 value\(s\) that are not finite"),
        (_with("lstm_fused_cls.0.weight", np.zeros((25, 8))), r"the checkpoint has 25 labels \(lstm_fused_cls.*not 3"),
        (lambda _: {}, r"lacks .* and \d+ more, which medfuse needs"),
    ],
)
def test_a_wrong_checkpoint_is_named_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        _load_tiny(change(_tiny_state_dict()))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_method_says_which():
    with pytest.raises(
        UserError, match=r"lacks .*fused_cls.* which joint needs; it has all weights of uni_cxr, medfuse$"
    ):
        _load_tiny(_tiny_state_dict("medfuse") | _tiny_state_dict("uni_cxr"), "joint")
    with pytest.raises(UserError, match=r"method is 'medfusion'.*Did you mean 'medfuse'"):
        _load_tiny(_tiny_state_dict(), "medfusion")


def test_a_classifier_of_another_size_is_told_its_own_count_of_labels():
    state_dict = _with("cxr_model.classifier.0.weight", np.zeros((5, 32)))(_tiny_state_dict("unified"))
    with pytest.raises(UserError, match=r"has 5 labels \(cxr_model\.classifier\.0\.weight is \[5, 32\]\), not 14"):
        _load_tiny(state_dict, "unified")


def test_imagenet_weights_fill_the_image_encoder():
    released = _tiny_state_dict("uni_cxr")
    prefix = "cxr_model.vision_backbone."
    imagenet = {n.removeprefix(prefix): v for n, v in released.items() if n.startswith(prefix)}
    imagenet |= {"fc.weight": np.zeros((1000, 32), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    model, variables = _tiny("uni_cxr")
    assert torch_import.is_backbone(imagenet) and not torch_import.is_backbone(released)
    expected = {group: {"cxr_encoder": variables[group]["cxr_encoder"]} for group in variables}
    jax.tree.map(np.testing.assert_array_equal, torch_import.fill_backbone(model, imagenet), expected)
    fused = registry.build("daft3", NUM_LABELS, **TINY)  # which has no stage 4 to fill
    assert set(torch_import.fill_backbone(fused, imagenet)["params"]["cxr_encoder"]) == {
        name for name in expected["params"]["cxr_encoder"] if not name.startswith("stage4")
    }


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        (
            _without("layer3.0.conv1.weight"),
            "uni_cxr",
            r"lacks layer3\.0\.conv1\.weight, which the X-ray encoder needs",
        ),
        (_with("layer3.1.conv1.weight", np.zeros(3)), "uni_cxr", r"holds layer3\.1\.conv1\.weight, which no"),
        (_with("bn1.weight", np.zeros(5)), "medfuse", r"bn1\.weight has shape \[5\]; \[4\] was expected"),
        (lambda state_dict: state_dict, "uni_ehr", "weights of an X-ray encoder.*which this config's method has not"),
    ],
)
def test_imagenet_weights_that_do_not_fit_are_refused(change, method, message):
    prefix = "cxr_model.vision_backbone."
    imagenet = {n.removeprefix(prefix): v for n, v in _tiny_state_dict("uni_cxr").items() if n.startswith(prefix)}
    with pytest.raises(UserError, match=message):
        torch_import.fill_backbone(registry.build(method, NUM_LABELS, **TINY), change(imagenet))


def test_a_tiny_resnet_equals_torchs():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    state_dict = {n: torch.from_numpy(np.array(v)) for n, v in _tiny_state_dict("uni_cxr").items()}
    prefix = "cxr_model.vision_backbone."

    def norm(x, name):
        mean, var, scale, bias = (state_dict[f"{prefix}{name}.{p}"] for p in _NORM_PARTS)
        return functional.batch_norm(x, mean.clone(), var.clone(), scale, bias, training=False)

    def conv(x, name, stride=1):
        kernel = state_dict[f"{prefix}{name}.weight"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    image_PHW = np.random.default_rng(0).standard_normal((2, 48, 48)).astype(np.float32)
    x = functional.relu(norm(conv(torch.from_numpy(image_PHW)[:, None].repeat(1, 3, 1, 1), "conv1", 2), "bn1"))
    x = functional.max_pool2d(x, 3, 2, 1)
    for i in range(1, 5):
        block, stride = f"layer{i}.0.", 2 if i > 1 else 1
        y = functional.relu(norm(conv(x, f"{block}conv1", stride), f"{block}bn1"))
        y = norm(conv(y, f"{block}conv2"), f"{block}bn2")
        shortcut = norm(conv(x, f"{block}downsample.0", stride), f"{block}downsample.1") if i > 1 else x
        x = functional.relu(y + shortcut)
    model, variables = _tiny("uni_cxr")
    got = fast_jit(model.apply)(variables, image=image_PHW)
    np.testing.assert_allclose(got["cxr_features"], x.mean((2, 3)).numpy(), rtol=1e-4, atol=1e-4)


_NORM_PARTS = ("running_mean", "running_var", "weight", "bias")


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
    """{name: largest deviation from the released model's output}"""
    ours, released = _outputs(real_data, case), reference_outputs(real_data, case)
    assert released, f"the reference has no case {case}"
    return {name: float(np.abs(ours[_OUTPUT_NAMES.get(name, name)] - x).max()) for name, x in released.items()}


@pytest.mark.parametrize("case", _CASES)
def test_outputs_equal_the_released_models(real_data, case):
    worst = _worst(real_data, case)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", _CASES)
def test_released_checkpoints_hold_what_is_needed_and_the_rest_is_listed(real_data, case):
    state_dict = reference_shapes(real_data, case)  # their names are what counts here
    method, _, _ = _CASES[case]
    needed = {name for row in torch_import.table(method) for name in row.names}
    unused = torch_import.unused(state_dict, method)
    assert len(needed) + len(unused) == len(state_dict) and needed.isdisjoint(unused)
    assert set(unused) <= torch_import.known_names()


def _gates_in_another_order(monkeypatch):
    split = jax.numpy.split

    def swapped(gates, parts, axis):
        i, f, g, o = split(gates, parts, axis=axis)
        return i, f, o, g

    monkeypatch.setattr(ehr_encoder.jnp, "split", swapped)


def _same_padding(monkeypatch):
    def conv(x, kernel, stride, padding):
        return jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    monkeypatch.setattr(resnet, "_conv", conv)


def _another_epsilon(monkeypatch):
    monkeypatch.setattr(resnet, "BATCH_NORM_EPSILON", 1e-3)


@pytest.mark.parametrize(
    ("case", "plant"),
    [("uni_ehr", _gates_in_another_order), ("uni_cxr", _same_padding), ("uni_cxr", _another_epsilon)],
)
def test_parity_notices_a_planted_error(real_data, monkeypatch, case, plant):
    plant(monkeypatch)
    _apply.cache_clear()
    try:
        assert max(_worst(real_data, case).values()) > 5 * TOLERANCE
    finally:
        _apply.cache_clear()


# Of one training step: the largest relative deviation of the loss and of the gradients' norms, the largest
# absolute one of the stem's running mean, the largest relative one of its running variance.
_STEP_TOLERANCES = {"loss": 1e-3, "gradient norms": 1e-3, "stem mean": 1e-5, "stem variance": 1e-4}


@functools.cache
def _training_step(model):
    def loss(params, batch_stats, batch, labels):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, **batch, train=True, mutable=["batch_stats"]
        )
        return optax.sigmoid_binary_cross_entropy(outputs["logits"], labels).mean(), updated["batch_stats"]

    # Not fast_jit: without vectorised sums the gradients of the first stage's biases are off by 5e-4.
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _step_deviations(real_data, plant=lambda variables, batch, labels: None) -> dict[str, float]:
    """How far one paired training step, without dropout, is from the released model's. plant: changes what goes in."""
    model, variables = torch_import.load(reference_state_dict(real_data, "medfuse"), "medfuse", 25, dropout=0.0)
    ehr, length, image, _, labels = reference_module(real_data).inputs(seed=100)
    batch = {"ehr": ehr, "length": length, "image": image}
    plant(variables, batch, labels)
    step = _training_step(model)
    (value, stats), gradients = step(variables["params"], variables["batch_stats"], batch, labels)

    released = reference_outputs(real_data, "train_paired")
    flat = {("params", *path): leaf for path, leaf in traverse_util.flatten_dict(gradients).items()}
    paths = {name: row.path for row in torch_import.table("medfuse") for name in row.names}
    norms = {name.removeprefix("gradnorm/"): x for name, x in released.items() if name.startswith("gradnorm/")}
    assert set(norms) == {name for name, path in paths.items() if path[0] == "params"}
    stem = stats["cxr_encoder"]["stem_norm"]
    return {
        "loss": abs(value / released["loss"] - 1),
        "gradient norms": max(abs(np.linalg.norm(np.ravel(flat[paths[name]])) / norms[name] - 1) for name in norms),
        "stem mean": np.abs(stem["mean"] - released["bn1_running_mean"]).max(),
        "stem variance": np.abs(stem["var"] / released["bn1_running_var"] - 1).max(),
    }


def test_one_paired_training_step_equals_the_released_models(real_data):
    """Loss, gradient norms and batch statistics; every row paired."""
    deviations = _step_deviations(real_data)
    assert all(deviations[name] < tolerance for name, tolerance in _STEP_TOLERANCES.items()), deviations


def _one_bias_left_out(variables, batch, labels):
    cell = variables["params"]["fusion_lstm"]["cell"]
    cell["bias"] = cell["bias"] / 2


def _one_label_flipped(variables, batch, labels):
    labels[0, 0] = 1 - labels[0, 0]


def _images_shifted_by_a_grey_level(variables, batch, labels):
    batch["image"] = batch["image"] + 1 / 255 / 0.229  # ImageNet's standardisation


def _images_scaled_as_another_channel(variables, batch, labels):
    batch["image"] = batch["image"] * (0.229 / 0.225)  # ImageNet's red and blue


def _gates_of_one_kernel_in_another_order(variables, batch, labels):
    layer = variables["params"]["ehr_encoder"]["layer1"]
    i, f, g, o = jnp.split(layer["recurrent_kernel"], 4, axis=-1)
    layer["recurrent_kernel"] = jnp.concatenate([i, f, o, g], axis=-1)


@pytest.mark.parametrize(
    ("plant", "notices"),
    [
        (_one_bias_left_out, ["loss", "gradient norms"]),
        (_one_label_flipped, ["gradient norms"]),
        (_images_scaled_as_another_channel, ["stem variance"]),
        (_images_shifted_by_a_grey_level, ["stem mean"]),
        (_gates_of_one_kernel_in_another_order, ["gradient norms"]),
    ],
)
def test_the_training_step_notices_a_planted_error(real_data, plant, notices):
    deviations = _step_deviations(real_data, plant)
    assert all(deviations[name] > 2 * _STEP_TOLERANCES[name] for name in notices), deviations
