"""`python -m medfuse_jax.torch_import`: import into a workdir, export from it, start training from it."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from model_cases import random_variables

from medfuse_jax import evaluate, schema, torch_import, train
from medfuse_jax import run as run_lib
from medfuse_jax.runs import checkpoints, sources, warm_start
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import import __main__ as command

pytest.importorskip("safetensors", reason="safetensors is not installed")

_ROOT = Path(__file__).parents[2]
_PREFIX = "cxr_model.vision_backbone."
_UNUSED = {"fused_cls.0.weight": np.zeros((3, 16), np.float32), "fused_cls.0.bias": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def imported(shared_tiny_config, tmp_path_factory):
    """A medfuse checkpoint file with random weights, imported: file, variables, workdir, printed."""
    folder = tmp_path_factory.mktemp("imported")
    config = shared_tiny_config.copy_and_resolve_references()
    variables = random_variables(run_lib.open_run(config).options.model, seed=0)
    path = folder / "medfuse.safetensors"
    torch_import.write(path, {**torch_import.export(variables, "medfuse"), **_UNUSED})
    printed = "\n".join(command.import_weights(path, config, folder / "run"))
    return SimpleNamespace(file=path, variables=variables, workdir=folder / "run", printed=printed)


@pytest.fixture(scope="module")
def imagenet(imported, shared_tiny_config, tmp_path_factory):
    """The same X-ray encoder as a bare ResNet, imported for a medfuse run."""
    folder = tmp_path_factory.mktemp("imagenet")
    state_dict = torch_import.read(imported.file)
    backbone = {n.removeprefix(_PREFIX): v for n, v in state_dict.items() if n.startswith(_PREFIX)}
    torch_import.write(folder / "resnet.safetensors", {**backbone, "fc.weight": np.zeros((1000, 32), np.float32)})
    config = shared_tiny_config.copy_and_resolve_references()
    printed = "\n".join(command.import_weights(folder / "resnet.safetensors", config, folder / "run"))
    return SimpleNamespace(workdir=folder / "run", printed=printed)


def _best(config, workdir: Path):
    return checkpoints.restore_best(workdir, run_lib.open_run(config).abstract_state())


def _start(config, workdir: Path, name: str, fresh):
    """Return the state that `main --config.init.<name>=workdir` starts from."""
    run, source = run_lib.open_run(config), sources.reopen(workdir)
    sources.check(run, name, workdir, source)
    return warm_start.begin(fresh, {name: (workdir, source)})


def _assert_same_bits(a, b):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _refused(call, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return caught.value


def test_import_then_export_gives_the_same_bits(imported, tiny_config, tmp_path):
    assert "not used by medfuse: fused_cls.0 (bias, weight)" in imported.printed
    assert f"python -m medfuse_jax.evaluate --workdir={imported.workdir}" in imported.printed
    note = checkpoints.imported(imported.workdir)
    assert note["file"] == "medfuse.safetensors" and sorted(note["unused"]) == sorted(_UNUSED)
    state = _best(tiny_config, imported.workdir)
    jax.tree.map(_assert_same_bits, {"params": state.params, "batch_stats": state.batch_stats}, imported.variables)

    exported = tmp_path / "out.safetensors"
    assert str(exported) in command.export_weights(imported.workdir, exported)
    before, after = torch_import.read(imported.file), torch_import.read(exported)
    assert set(before) - set(after) == set(_UNUSED) and set(after) <= set(before)
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)


def test_scores_are_those_of_the_imported_weights(imported, tiny_config):
    """Compares with the model applied to one record, and with other weights."""
    result = evaluate.evaluate(imported.workdir)
    assert result["selected_by"] == "imported from medfuse.safetensors" and result["best_epoch"] == 0
    run = run_lib.open_run(tiny_config)
    index = run.dataset.index["test"]
    unpaired = int(np.flatnonzero(~index["has_cxr"])[0])
    ehr_TF = (run.dataset.splits["test"][unpaired]["ehr"] - run.dataset.mean_F) / run.dataset.std_F
    model = run.options.model
    score_K, other_K = (
        jax.nn.sigmoid(model.apply(variables, ehr=ehr_TF[None])["logits"][0])
        for variables in (imported.variables, random_variables(model, seed=1))
    )
    with np.load(imported.workdir / "predictions_test.npz") as stored:
        np.testing.assert_allclose(stored["scores"][unpaired], score_K, atol=1e-5)
        assert np.abs(stored["scores"][unpaired] - other_K).max() > 1e-3


def test_training_starts_from_an_imported_model_or_encoder(imported, imagenet, tiny_config):
    fresh = run_lib.open_run(tiny_config).fresh_state()
    started = _start(tiny_config, imported.workdir, "model", fresh)
    jax.tree.map(_assert_same_bits, {"params": started.params, "batch_stats": started.batch_stats}, imported.variables)
    for name, workdir in (("ehr", imported.workdir), ("cxr", imagenet.workdir)):
        started, module = _start(tiny_config, workdir, name, fresh), f"{name}_encoder"
        jax.tree.map(_assert_same_bits, started.params[module], imported.variables["params"][module])
        for other in fresh.params.keys() - {module}:
            jax.tree.map(_assert_same_bits, started.params[other], fresh.params[other])
    encoder_stats = imported.variables["batch_stats"]["cxr_encoder"]
    jax.tree.map(_assert_same_bits, started.batch_stats["cxr_encoder"], encoder_stats)


def test_imported_run_is_not_trained_further(imported, tiny_config):
    train.train(run_lib.open_run(tiny_config), imported.workdir)
    jax.tree.map(_assert_same_bits, _best(tiny_config, imported.workdir).params, imported.variables["params"])


def test_imagenet_weights_start_only_the_cxr_encoder(imagenet, tiny_config):
    assert "fc (weight)" in imagenet.printed and "config.init.cxr" in imagenet.printed
    assert "evaluate" not in imagenet.printed
    assert _refused(evaluate.evaluate, imagenet.workdir).value == ["cxr_encoder"]
    assert _refused(_start, tiny_config, imagenet.workdir, "model", None).value == "classifier"
    assert _refused(_start, tiny_config, imagenet.workdir, "ehr", None).value == "ehr_encoder"


def test_model_with_other_labels_is_not_a_start(imported, tiny_config):
    tiny_config.task = "mortality"
    error = _refused(_start, tiny_config, imported.workdir, "model", None)
    assert (error.field, error.value) == ("config.init.model", "classifier")


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"task": "mortality"}, "lstm_fused_cls.0.weight", (25, 8)),
        ({"method": "joint"}, "", ["fused_cls.0.weight", "fused_cls.0.bias"]),
        ({"model.ehr_hidden": 4}, "ehr_model.layer0.weight_ih_l0", (32, 76)),
        ({"data.dir": ""}, "config.data.dir", None),
    ],
)
def test_weights_that_do_not_match_the_config_leave_no_workdir(imported, tiny_config, tmp_path, changes, field, value):
    path = tmp_path / imported.file.name
    torch_import.write(path, {n: v for n, v in torch_import.read(imported.file).items() if n not in _UNUSED})
    tiny_config.update_from_flattened_dict(changes)
    error = _refused(command.import_weights, path, tiny_config, tmp_path / "run")
    assert error.field == field and (error.value == value or sorted(error.value) == sorted(value))
    assert not (tmp_path / "run").exists()


def test_precomputed_features_matter_only_to_a_method_that_reads_x_rays(imported, tiny_config, tmp_path):
    tiny_config.model.cxr_encoder, tiny_config.data.cxr_features = "features", "gone.npz"
    error = _refused(command.import_weights, imported.file, tiny_config, tmp_path / "run")
    assert error.field == "config.model.cxr_encoder" and not (tmp_path / "run").exists()
    tiny_config.method = "uni_ehr"
    variables = random_variables(run_lib.open_run(tiny_config).options.model, seed=0)
    torch_import.write(tmp_path / "ehr.safetensors", torch_import.export(variables, "uni_ehr"))
    command.import_weights(tmp_path / "ehr.safetensors", tiny_config, tmp_path / "run")
    command.export_weights(tmp_path / "run", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ehr.safetensors").read_bytes()
    error = _refused(command.import_weights, imported.file, tiny_config, tmp_path / "other")
    assert "it has all weights of" in str(error)  # of other methods


def test_workdir_in_use_is_left_alone(imported, tiny_config, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert _refused(command.import_weights, imported.file, tiny_config, tmp_path).path == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_differences_from_the_released_training_data_are_noted(imported, shared_tiny_config):
    assert "MIMIC-III's mean and deviation" in imported.printed and "time steps of 1 h (here 2 h)" in imported.printed
    config = shared_tiny_config.copy_and_resolve_references()
    config.data.statistics = "statistics.json"
    assert command._differences_from_released(config, {"timestep_h": 1.0, "profile": "released"}) == []


def test_wrong_flags_end_in_one_line():
    arguments = [sys.executable, "-m", "medfuse_jax.torch_import", "--workdir=x", "--checkpoint=y"]
    done = subprocess.run(arguments, cwd=_ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "--export=FILE" in lines[0], done.stderr
    with pytest.raises(UserError, match="gone"):
        command.export_weights(Path("gone"), Path("y.safetensors"))


def test_snippet_of_the_page_converts_a_normalizer(tmp_path):
    stored = {"means": np.arange(76.0), "stds": np.arange(1.0, 77.0)}
    (tmp_path / "x.normalizer").write_bytes(pickle.dumps(stored))
    page = (_ROOT / "docs" / "weights.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    subprocess.run([sys.executable, "-c", snippet, "x.normalizer"], cwd=tmp_path, env=environment, check=True)
    content = json.loads((tmp_path / "mimic3.json").read_text())
    changed = [i for i, (mean, std) in enumerate(zip(content["mean"], content["std"])) if (mean, std) != (0, 1)]
    assert changed == [i for i, name in enumerate(schema.CHANNELS) if "->" not in name] and len(changed) == 12
    assert all(content["mean"][i] == i and content["std"][i] == i + 1 for i in changed)
