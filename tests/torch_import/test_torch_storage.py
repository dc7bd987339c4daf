"""Checkpoint files: what is read back, and one line for each that cannot be."""

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
    return message


def test_what_the_released_trainer_saves_is_read(torch, tmp_path):
    path = tmp_path / "best_checkpoint.pth.tar"
    # beside the weights, its AUROC as a numpy number
    content = {"epoch": 7, "best_auroc": np.float64(0.77), "optimizer": {"state": {}}}
    torch.save({**content, "state_dict": _tensors(torch, "module.")}, path)
    _assert_same(storage.read(path))


def test_arrays_beside_the_weights_are_read_over(torch, tmp_path, capsys):
    path = tmp_path / "x.pth.tar"
    arrays = [np.linspace(0, 1, 3), np.ones(2, np.float32), np.arange(4), np.array([True])]
    torch.save({"state_dict": _tensors(torch), "scores": arrays, "auroc": np.float32(0.5)}, path)
    _assert_same(storage.read(path))
    torch.save({"state_dict": _tensors(torch), "scores": np.array([_Mischief()])}, path)
    assert "holds more than numbers (objects)" in _refused(path)
    assert "executed" not in capsys.readouterr().out


def test_a_bare_state_dict_of_parameters_is_read(torch, tmp_path):
    path = tmp_path / "old.pth"  # as torchvision's oldest files: not zipped, and parameters, not tensors
    tensors = _tensors(torch)
    tensors["a.weight"] = torch.nn.Parameter(tensors["a.weight"])
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    _assert_same(storage.read(path))


def test_module_is_only_taken_off_where_it_is_a_prefix_of_all(torch, tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "both.pth")
    assert sorted(storage.read(tmp_path / "both.pth")) == ["a", "module.a"]


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_what_is_written_is_read_back_to_the_bit(suffix, tmp_path):
    pytest.importorskip("torch" if suffix == ".pth.tar" else "safetensors", reason="its package is not installed")
    path = tmp_path / "new" / f"model{suffix}"
    storage.write(path, _STATE_DICT)
    read = storage.read(path)
    assert sorted(read) == sorted(_STATE_DICT)
    _assert_same({name: read[name] for name in _STATE_DICT})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match="is there already"):
        storage.write(path, _STATE_DICT)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.pickle: the name of an exported file ends in \.safetensors or"):
        storage.write(tmp_path / "model.pickle", _STATE_DICT)
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        storage.write(tmp_path / "file" / "model.safetensors", _STATE_DICT)


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_a_folder_that_takes_no_file_is_one_line(suffix):
    pytest.importorskip("torch" if suffix == ".pth.tar" else "safetensors", reason="its package is not installed")
    with pytest.raises(UserError, match=rf"model\{suffix} cannot be written \(") as caught:
        storage.write(f"/proc/model{suffix}", _STATE_DICT)  # where root may not write either
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


def test_code_in_a_file_is_refused_and_not_run(torch, tmp_path, capsys):
    path = tmp_path / "best_checkpoint.pth.tar"
    torch.save({"state_dict": _Mischief()}, path)
    assert "holds more than numbers (print), which could run code" in _refused(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "holds no state dict"),
        ({"state_dict": {"epoch": 3}}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        ({"state_dict": {}}, "holds no weights"),
    ],
)
def test_a_file_of_something_else_is_named(torch, tmp_path, content, said):
    torch.save(content, tmp_path / "x.pth")
    assert said in _refused(tmp_path / "x.pth")


def test_a_sparse_tensor_is_named(torch, tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x.pth")
    assert "a is a sparse, quantised or meta tensor" in _refused(tmp_path / "x.pth")


def test_a_tensor_without_values_is_named(torch, tmp_path):
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "x.pth")
    assert "a is a sparse, quantised or meta tensor" in _refused(tmp_path / "x.pth")


def test_a_conjugated_tensor_is_read_as_what_it_says(torch, tmp_path):
    torch.save({"a": torch.tensor([1 + 2j]).conj(), "b": torch.tensor([1 + 2j]).conj().imag}, tmp_path / "x.pth")
    read = storage.read(tmp_path / "x.pth")
    assert read["a"].tolist() == [1 - 2j] and read["b"].tolist() == [-2]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_off_anywhere_is_one_line(torch, tmp_path, zipped):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:size])
        assert "x.pth.tar" in _refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # where the byte was that of the protocol
@pytest.mark.parametrize("zipped", [True, False])
def test_a_changed_byte_is_one_line_or_changes_no_name(torch, tmp_path, zipped):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(150):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            read = storage.read(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        if zipped:  # only what is not content was changed
            _assert_same(read)


def test_a_changed_weight_is_found_by_its_checksum(torch, tmp_path):
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": _tensors(torch)}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(_STATE_DICT["a.weight"].tobytes()) + 3] ^= 1  # another exponent: a number all the same
    path.write_bytes(whole)
    assert "does not match its checksum" in _refused(path)


def test_a_damaged_safetensors_file_is_one_line(safetensors, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save_file(_STATE_DICT, path)
    jax.tree.map(np.testing.assert_array_equal, storage.read(path), _STATE_DICT)
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        assert "not a whole safetensors file" in _refused(path)
    path.write_bytes(b"not safetensors at all")
    assert "not a whole safetensors file" in _refused(path)


def test_what_is_no_file_is_named(tmp_path):
    assert "no checkpoint file" in _refused(tmp_path / "gone.pth.tar")
    assert "is a folder: give the checkpoint file in it" in _refused(tmp_path)
    (tmp_path / "empty.pth").touch()
    assert "is an empty file" in _refused(tmp_path / "empty.pth")


@pytest.mark.parametrize(("name", "package"), [("x.pth.tar", "torch"), ("x.safetensors", "safetensors")])
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, name, package):
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
