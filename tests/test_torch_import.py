"""Released weights: the table of names, what is refused, files, and parity with the released models."""

import functools

import jax
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
from medfuse_jax.errors import UserError
from medfuse_jax.models import lstm, methods, resnet

TOLERANCE = 1e-4  # of the contract, in float32

# case of the reference -> (method, labels, whether every row has its film)
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
    model = methods.build(method, NUM_LABELS, **TINY)
    return model, random_variables(model)


def _tiny_state_dict(method: str = "medfuse") -> dict:
    return torch_import.export(_tiny(method)[1], method)


def _load_tiny(state_dict: dict, method: str = "medfuse", num_labels: int = NUM_LABELS):
    return torch_import.load(state_dict, method, num_labels, **TINY)


@pytest.mark.parametrize("method", methods.METHODS)
def test_export_and_load_are_inverse(method):
    model, variables = _tiny(method)
    state_dict = torch_import.export(variables, method)
    loaded_model, loaded = _load_tiny(state_dict, method)
    assert loaded_model == model
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert {v.dtype for v in state_dict.values()} <= {np.dtype("float32"), np.dtype("int64")}


@pytest.mark.parametrize("method", methods.METHODS)
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
        (_with("projection.weight", _NAN), r"projection\.weight holds 256 values that are not finite"),
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
        UserError, match=r"lacks .*fused_cls.* which joint needs; it has all that uni_cxr, medfuse need$"
    ):
        _load_tiny(_tiny_state_dict("medfuse") | _tiny_state_dict("uni_cxr"), "joint")
    with pytest.raises(UserError, match=r"method is 'medfusion'.*Did you mean 'medfuse'"):
        _load_tiny(_tiny_state_dict(), "medfusion")


def test_imagenet_weights_fill_the_film_encoder():
    released = _tiny_state_dict("uni_cxr")
    prefix = "cxr_model.vision_backbone."
    imagenet = {n.removeprefix(prefix): v for n, v in released.items() if n.startswith(prefix)}
    imagenet |= {"fc.weight": np.zeros((1000, 32), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    loaded = torch_import.load_backbone(imagenet, **{"stage_sizes": TINY["resnet_stage_sizes"], "width": 4})
    _, variables = _tiny("uni_cxr")
    expected = {group: {"cxr_encoder": variables[group]["cxr_encoder"]} for group in variables}
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    with pytest.raises(UserError, match=r"lacks layer3\.0\.conv1\.weight"):
        torch_import.load_backbone(_without("layer3.0.conv1.weight")(imagenet), TINY["resnet_stage_sizes"], 4)


def test_torch_files_are_read_safely(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    state_dict = _tiny_state_dict()
    tensors = {f"module.{name}": torch.tensor(value) for name, value in state_dict.items()}
    path = tmp_path / "best_checkpoint.pth.tar"
    # what the released trainer stores beside the weights, its AUROC as a numpy number
    torch.save({"epoch": 7, "best_auroc": np.float64(0.77), "optimizer": {"state": {}}, "state_dict": tensors}, path)
    read = torch_import.read(path)
    assert list(read) == list(state_dict)
    jax.tree.map(np.testing.assert_array_equal, read, state_dict)
    _load_tiny(read)
    bare = tmp_path / "bare.pth"
    torch.save({name: torch.tensor(value) for name, value in state_dict.items()}, bare)
    jax.tree.map(np.testing.assert_array_equal, torch_import.read(bare), state_dict)

    class Mischief:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Mischief()}, path)
    with pytest.raises(UserError, match=r"best_checkpoint\.pth\.tar is not a checkpoint that can be read safely"):
        torch_import.read(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="holds no state dict"):
        torch_import.read(path)
    path.write_bytes(bare.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a checkpoint"):
        torch_import.read(path)


def test_safetensors_files_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    state_dict, path = _tiny_state_dict(), tmp_path / "model.safetensors"
    safetensors.save_file(state_dict, path)
    jax.tree.map(np.testing.assert_array_equal, torch_import.read(path), state_dict)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        torch_import.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint file .*gone\.pth\.tar"):
        torch_import.read(tmp_path / "gone.pth.tar")


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

    monkeypatch.setattr(lstm.jnp, "split", swapped)


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


def test_one_paired_training_step_equals_the_released_models(real_data):
    """Loss, gradient norms and batch statistics; every row paired, no dropout."""
    state_dict = reference_state_dict(real_data, "medfuse")
    model, variables = torch_import.load(state_dict, "medfuse", 25, dropout=0.0)
    ehr, length, image, _, labels = reference_module(real_data).inputs(seed=100)

    def loss(params, train=True):
        outputs, updated = model.apply(
            {**variables, "params": params}, ehr=ehr, length=length, image=image, train=train, mutable=["batch_stats"]
        )
        return optax.sigmoid_binary_cross_entropy(outputs["logits"], labels).mean(), updated["batch_stats"]

    # Not fast_jit: without vectorised sums the gradients of the first stage's biases are off by 5e-4.
    (value, stats), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    released = reference_outputs(real_data, "train_paired")
    np.testing.assert_allclose(value, released["loss"], rtol=1e-3)
    by_running_statistics, _ = fast_jit(lambda params: loss(params, train=False))(variables["params"])
    assert abs(by_running_statistics / released["loss"] - 1) > 5e-3
    stem = stats["cxr_encoder"]["stem_norm"]
    np.testing.assert_allclose(stem["mean"], released["bn1_running_mean"], atol=1e-5)
    np.testing.assert_allclose(stem["var"], released["bn1_running_var"], rtol=1e-4)

    flat = {("params", *path): leaf for path, leaf in traverse_util.flatten_dict(gradients).items()}
    rows = {name: row.path for row in torch_import.table("medfuse") for name in row.names}
    norms = {name.removeprefix("gradnorm/"): x for name, x in released.items() if name.startswith("gradnorm/")}
    assert set(norms) == {name for name, path in rows.items() if path[0] == "params"}
    ours = {name: np.linalg.norm(np.ravel(flat[rows[name]])) for name in norms}
    np.testing.assert_allclose([ours[n] for n in norms], [norms[n] for n in norms], rtol=1e-3)
