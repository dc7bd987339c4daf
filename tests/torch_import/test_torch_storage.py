"""Checkpoint files: exact round trips, and one line for each file that cannot be read."""

import argparse
import builtins
import random

import jax
import numpy as np
import pytest

from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import import storage

_RNG = np.random.default_rng(0)
_STATE_DICT = {
    "a.weight": _RNG.standard_normal((8, 4)).astype(np.float32),
    "a.bias": np.array([0.0, -0.0, 1e-40, 3e38], np.float32),
    "norm.num_batches_tracked": np.zeros((), np.int64),
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def _tensors(torch, prefix: str = "") -> dict:
    return {f"{prefix}{name}": torch.tensor(value) for name, value in _STATE_DICT.items()}


def _assert_same(read: dict) -> None:
    assert list(read) == list(_STATE_DICT)
    for name, value in _STATE_DICT.items():
        assert read[name].tobytes() == value.astype(read[name].dtype).tobytes(), name


def _refused(path) -> str:
    with pytest.raises(UserError) as caught:
        storage.read(path)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 400
    assert caught.value.path == path
    return message


def test_checkpoint_of_the_released_trainer_is_read(torch, tmp_path):
    path = tmp_path / "best_checkpoint.pth.tar"
    # It stores its AUROC as a numpy number.
    content = {"epoch": 7, "best_auroc": np.float64(0.77), "optimizer": {"state": {}}}
    torch.save({**content, "state_dict": _tensors(torch, "module.")}, path)
    _assert_same(storage.read(path))


def test_arrays_beside_the_weights_are_ignored(torch, tmp_path, capsys):
    path = tmp_path / "x.pth.tar"
    arrays = [np.linspace(0, 1, 3), np.ones(2, np.float32), np.arange(4), np.array([True])]
    torch.save({"state_dict": _tensors(torch), "scores": arrays, "auroc": np.float32(0.5)}, path)
    _assert_same(storage.read(path))
    torch.save({"state_dict": _tensors(torch), "scores": np.array([_Mischief()])}, path)
    assert "holds more than numbers (objects)" in _refused(path)
    assert "executed" not in capsys.readouterr().out


def test_bare_state_dict_of_parameters_is_read(torch, tmp_path):
    path = tmp_path / "old.pth"  # like torchvision's oldest files: not zipped, parameters instead of tensors
    tensors = _tensors(torch)
    tensors["a.weight"] = torch.nn.Parameter(tensors["a.weight"])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    _assert_same(storage.read(path))


def test_module_prefix_is_removed_only_if_all_names_have_it(torch, tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "both.pth")
    assert sorted(storage.read(tmp_path / "both.pth")) == ["a", "module.a"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module.module."])
def test_prefixes_of_wrappers_are_removed_in_any_nesting_and_said(torch, tmp_path, prefix):
    torch.save(_tensors(torch, prefix), tmp_path / "x.pth")
    notes = []
    _assert_same(storage.read(tmp_path / "x.pth", notes))
    assert len(notes) == 1 and repr(prefix) in notes[0]


def test_wrappers_of_a_part_of_the_model_are_removed_and_said(torch, tmp_path):
    torch.save({"a.module.b": torch.ones(1), "c._orig_mod.d": torch.ones(1), "e": torch.ones(1)}, tmp_path / "x.pth")
    notes = []
    assert sorted(storage.read(tmp_path / "x.pth", notes)) == ["a.b", "c.d", "e"]
    assert len(notes) == 1 and "2 of them" in notes[0]
    torch.save({"a.module.b": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "x.pth")
    assert sorted(storage.read(tmp_path / "x.pth", notes)) == ["a.b", "a.module.b"] and len(notes) == 1


@pytest.mark.parametrize("entry", ["model", "model_state_dict"])
def test_weights_beside_the_arguments_of_a_trainer_are_read(torch, tmp_path, capsys, entry):
    path, arguments = tmp_path / "x.pth", argparse.Namespace(lr=1e-4, name="x", layers=[1, 2])
    torch.save({entry: _tensors(torch), "args": arguments, "epoch": 3}, path)
    _assert_same(storage.read(path))
    arguments.hook = _Mischief()
    torch.save({entry: _tensors(torch), "args": arguments}, path)
    assert "torch.save({'state_dict': model.state_dict()}, FILE)" in _refused(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_written_state_dict_is_read_back_to_the_bit(suffix, tmp_path):
    pytest.importorskip("torch" if suffix == ".pth.tar" else "safetensors", reason="its package is not installed")
    path = tmp_path / "new" / f"model{suffix}"
    storage.write(path, _STATE_DICT)
    read = storage.read(path)
    assert sorted(read) == sorted(_STATE_DICT)
    _assert_same({name: read[name] for name in _STATE_DICT})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match="exists"):
        storage.write(path, _STATE_DICT)


def test_unwritable_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="must end in"):
        storage.write(tmp_path / "model.pickle", _STATE_DICT)
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        storage.write(tmp_path / "file" / "model.safetensors", _STATE_DICT)


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_folder_that_cannot_be_written_is_one_line(suffix):
    pytest.importorskip("torch" if suffix == ".pth.tar" else "safetensors", reason="its package is not installed")
    with pytest.raises(UserError, match="cannot be written") as caught:
        storage.write(f"/proc/model{suffix}", _STATE_DICT)  # where even root cannot write
    assert "\n" not in str(caught.value)


def test_half_precision_is_read(torch, tmp_path):
    from safetensors import torch as safetensors_torch

    tensors = {"a": torch.tensor([0.5, -3.0], dtype=torch.bfloat16), "b": torch.tensor([0.25], dtype=torch.float16)}
    safetensors_torch.save_file(tensors, tmp_path / "half.safetensors")
    torch.save(tensors, tmp_path / "half.pth")
    for name in ("half.safetensors", "half.pth"):
        read = storage.read(tmp_path / name)
        np.testing.assert_array_equal(read["a"].astype(np.float32), [0.5, -3.0])
        np.testing.assert_array_equal(read["b"].astype(np.float32), [0.25])


class _Mischief:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_file_is_refused_and_never_run(torch, tmp_path, capsys):
    path = tmp_path / "best_checkpoint.pth.tar"
    torch.save({"state_dict": _Mischief()}, path)
    assert "holds more than numbers (print), which could run code" in _refused(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"epoch": 3}, "no state dict"),
        ({"state_dict": {"epoch": 3}}, "no state dict"),
        ([1, 2], "no state dict"),
        ({"state_dict": {}}, "no weights"),
    ],
)
def test_file_of_something_else_is_refused(torch, tmp_path, content, problem):
    torch.save(content, tmp_path / "x.pth")
    assert problem in _refused(tmp_path / "x.pth")


def test_tensor_without_plain_values_is_named(torch, tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({"a": tensor}, tmp_path / "x.pth")
        assert "a is a sparse, quantised or meta tensor" in _refused(tmp_path / "x.pth")


def test_conjugated_and_negated_views_are_resolved(torch, tmp_path):
    torch.save({"a": torch.tensor([1 + 2j]).conj(), "b": torch.tensor([1 + 2j]).conj().imag}, tmp_path / "x.pth")
    read = storage.read(tmp_path / "x.pth")
    assert read["a"].tolist() == [1 - 2j] and read["b"].tolist() == [-2]


@pytest.mark.parametrize("zipped", [True, False])
def test_file_truncated_anywhere_is_one_line(torch, tmp_path, zipped):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:size])
        _refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # where that byte was changed
@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bit_is_one_line_or_changes_nothing(torch, tmp_path, zipped):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(100):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            read = storage.read(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        if zipped:  # the bit was outside the content
            _assert_same(read)


def test_changed_weight_fails_its_checksum(torch, tmp_path):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(_STATE_DICT["a.weight"].tobytes()) + 3] ^= 1  # changes the exponent: still a number
    path.write_bytes(whole)
    assert "does not match its checksum" in _refused(path)


def test_damaged_safetensors_file_is_one_line(safetensors, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save_file(_STATE_DICT, path)
    jax.tree.map(np.testing.assert_array_equal, storage.read(path), _STATE_DICT)
    whole = path.read_bytes()
    for size in range(1, len(whole), 17):
        path.write_bytes(whole[:size])
        assert "not of safetensors" in _refused(path)
    path.write_bytes(b"not safetensors at all")
    assert "not of safetensors" in _refused(path)


def test_missing_or_empty_file_is_named(tmp_path):
    assert "no checkpoint file" in _refused(tmp_path / "gone.pth.tar")
    assert "is a folder" in _refused(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "is empty" in _refused(tmp_path / "empty.pth")


@pytest.mark.parametrize(("name", "package"), [("x.pth.tar", "torch"), ("x.safetensors", "safetensors")])
def test_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"something")
    real_import = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert f"pip install {package}" in _refused(tmp_path / name)
    with pytest.raises(UserError, match=f"pip install {package}"):
        storage.write(tmp_path / "new" / name, _STATE_DICT)
