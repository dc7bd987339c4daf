"""`python -m medfuse_jax.torch_import`: into a workdir, out of it, and as a start of training."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from model_cases import random_variables

from medfuse_jax import evaluate, experiment, schema, torch_import, train
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import import __main__ as command

pytest.importorskip("safetensors", reason="safetensors is not installed")

_ROOT = Path(__file__).parents[2]
_PREFIX = "cxr_model.vision_backbone."


def _variables(config, seed: int = 0) -> dict:
    """Made-up weights of a config's model."""
    return random_variables(experiment.open_experiment(config).options.model, seed)


def _file(folder: Path, config, **more) -> tuple[Path, dict]:
    """(a checkpoint file with made-up weights of a config's model and entries that it does not use, the weights)."""
    variables = _variables(config)
    path = folder / f"{config.method}.safetensors"
    torch_import.write(path, {**torch_import.export(variables, config.method), **more})
    return path, variables


def _imagenet(folder: Path, config) -> tuple[Path, dict]:
    variables = _variables(config)
    state_dict = torch_import.export(variables, config.method)
    path = folder / "resnet.safetensors"
    backbone = {n.removeprefix(_PREFIX): v for n, v in state_dict.items() if n.startswith(_PREFIX)}
    torch_import.write(path, {**backbone, "fc.weight": np.zeros((1000, 32), np.float32)})
    return path, variables


def _best(config, workdir: Path):
    return checkpoints.restore_best(workdir, experiment.open_experiment(config).abstract_state())


def _start(config, workdir: Path, name: str, fresh=None):
    """The state that `main --config.init.<name>=workdir` starts from."""
    run, source = experiment.open_experiment(config), workdir_lib.open_run(workdir)
    warm_start.check(run, name, workdir, source)
    return warm_start.begin(run.fresh_state() if fresh is None else fresh, {name: (workdir, source)})


def _assert_same_bits(a, b):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_imported_model_is_scored_at_once_and_exported_to_the_same_bits(tiny_config, tmp_path):
    unread = {"fused_cls.0.weight": np.zeros((3, 16), np.float32), "fused_cls.0.bias": np.zeros(3, np.float32)}
    path, variables = _file(tmp_path, tiny_config, **unread)
    said = "\n".join(command.import_weights(path, tiny_config, tmp_path / "run"))
    assert "not used by medfuse: fused_cls.0 (bias, weight)" in said
    assert f"python -m medfuse_jax.evaluate --workdir={tmp_path / 'run'}" in said
    state = _best(tiny_config, tmp_path / "run")
    jax.tree.map(_assert_same_bits, {"params": state.params, "batch_stats": state.batch_stats}, variables)

    result = evaluate.evaluate(tmp_path / "run")
    assert result["selected_by"] == "imported from medfuse.safetensors" and result["best_epoch"] == 0
    assert result["subsets"]["all"]["num_samples"] > 0

    exported = tmp_path / "out.safetensors"
    assert f"to {exported}" in command.export_weights(tmp_path / "run", exported)
    before, after = torch_import.read(path), torch_import.read(exported)
    assert set(before) - set(after) == set(unread) and set(after) <= set(before)
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)


def test_scores_are_those_of_the_imported_weights(tiny_config, tmp_path):
    """Against the model applied by hand to one record, and to other weights."""
    path, variables = _file(tmp_path, tiny_config)
    command.import_weights(path, tiny_config, tmp_path / "run")
    evaluate.evaluate(tmp_path / "run")
    run = experiment.open_experiment(tiny_config)
    index = run.dataset.index["test"]
    unpaired = int(np.flatnonzero(~index["has_cxr"])[0])
    ehr_TF = (run.dataset.splits["test"][unpaired]["ehr"] - run.dataset.mean_F) / run.dataset.std_F
    score_K = jax.nn.sigmoid(run.options.model.apply(variables, ehr=ehr_TF[None])["logits"][0])
    other_K = jax.nn.sigmoid(run.options.model.apply(_variables(tiny_config, 1), ehr=ehr_TF[None])["logits"][0])
    with np.load(tmp_path / "run" / "predictions_test.npz") as stored:
        np.testing.assert_allclose(stored["scores"][unpaired], score_K, atol=1e-5)
        assert np.abs(stored["scores"][unpaired] - other_K).max() > 1e-3


def test_training_starts_from_an_imported_model(tiny_config, tmp_path):
    path, variables = _file(tmp_path, tiny_config)
    command.import_weights(path, tiny_config, tmp_path / "run")
    fresh = experiment.open_experiment(tiny_config).fresh_state()
    started = _start(tiny_config, tmp_path / "run", "model", fresh)
    jax.tree.map(_assert_same_bits, {"params": started.params, "batch_stats": started.batch_stats}, variables)
    started = _start(tiny_config, tmp_path / "run", "ehr", fresh)
    jax.tree.map(_assert_same_bits, started.params["ehr_encoder"], variables["params"]["ehr_encoder"])
    jax.tree.map(_assert_same_bits, started.params["cxr_encoder"], fresh.params["cxr_encoder"])


def test_an_imported_run_is_finished(tiny_config, tmp_path):
    path, variables = _file(tmp_path, tiny_config)
    command.import_weights(path, tiny_config, tmp_path / "run")
    train.train(experiment.open_experiment(tiny_config), tmp_path / "run")
    jax.tree.map(_assert_same_bits, _best(tiny_config, tmp_path / "run").params, variables["params"])


def test_imagenet_weights_are_a_start_and_no_run_to_score(tiny_config, tmp_path):
    tiny_config.method, tiny_config.task = "uni_cxr", "radiology"
    path, variables = _imagenet(tmp_path, tiny_config)
    said = "\n".join(command.import_weights(path, tiny_config, tmp_path / "imagenet"))
    assert "cxr_encoder" in said and "fc (weight)" in said and "config.init.cxr" in said and "evaluate" not in said
    fresh = experiment.open_experiment(tiny_config).fresh_state()
    started = _start(tiny_config, tmp_path / "imagenet", "cxr", fresh)
    encoder = {group: variables[group]["cxr_encoder"] for group in variables}
    jax.tree.map(_assert_same_bits, started.params["cxr_encoder"], encoder["params"])
    jax.tree.map(_assert_same_bits, started.batch_stats["cxr_encoder"], encoder["batch_stats"])
    jax.tree.map(_assert_same_bits, started.params["classifier"], fresh.params["classifier"])
    with pytest.raises(UserError, match=r"imported weights of the cxr_encoder alone, which score nothing"):
        evaluate.evaluate(tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"the imported resnet\.safetensors held no classifier"):
        _start(tiny_config, tmp_path / "imagenet", "model", fresh)


def test_only_what_was_imported_is_a_start(tiny_config, tmp_path):
    path, _ = _imagenet(tmp_path, tiny_config)
    command.import_weights(path, tiny_config, tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"the imported resnet\.safetensors held no ehr_encoder"):
        _start(tiny_config, tmp_path / "imagenet", "ehr")


def test_a_start_of_another_method_or_task_is_refused(tiny_config, tmp_path):
    path, _ = _file(tmp_path, tiny_config)
    command.import_weights(path, tiny_config, tmp_path / "run")
    tiny_config.task = "mortality"
    with pytest.raises(UserError, match=r"the model of .* has other labels: for its encoders alone"):
        _start(tiny_config, tmp_path / "run", "model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "mortality"}, r"config\.task=mortality: the checkpoint has 25 labels .*, not 1$"),
        ({"method": "joint"}, r"config\.method=joint, .*lacks fused_cls.*; it has all weights of medfuse"),
        ({"model.ehr_hidden": 4}, r"has shape \[32, 76\]; \[16, 76\] was expected"),
        ({"data.dir": ""}, r"config\.data\.dir is empty: give the shards"),
    ],
)
def test_weights_that_do_not_fit_the_config_leave_no_workdir(tiny_config, tmp_path, changes, said):
    path, _ = _file(tmp_path, tiny_config)
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        command.import_weights(path, tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_in_use_is_left_alone(tiny_config, tmp_path):
    path, _ = _file(tmp_path, tiny_config)
    with pytest.raises(UserError, match="is not empty: choose another --workdir"):
        command.import_weights(path, tiny_config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_released_weights_were_trained_on_is_said_where_the_data_differs(tiny_config, tmp_path):
    path, _ = _file(tmp_path, tiny_config)
    said = "\n".join(command.import_weights(path, tiny_config, tmp_path / "run"))
    assert "MIMIC-III's mean and deviation" in said and "steps of 1 h (2 h here)" in said and "docs/weights.md" in said
    statistics = tmp_path / "statistics.json"
    statistics.write_text(json.dumps({"mean": [0] * 76, "std": [1] * 76}))
    tiny_config.data.statistics = str(statistics)
    assert "MIMIC-III" not in "\n".join(command.import_weights(path, tiny_config, tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--workdir=x", "give --checkpoint=FILE with --config=FILE to import, or --export=FILE alone to export"),
        ("--workdir=x --checkpoint=y", "give --checkpoint=FILE with"),
        ("--export=y.safetensors", "--workdir"),
        ("--workdir=gone --export=y.safetensors", "gone/config.json is missing"),
        ("--workdir=x --checkpoint=y --config=configs/phen.py", "configs/pheno.py"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "medfuse_jax.torch_import", *arguments.split()],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr


_PAGE = (_ROOT / "docs" / "weights.md").read_text()


def test_the_pages_snippet_makes_statistics_of_a_normalizer(tmp_path):
    stored = {"means": np.arange(76.0), "stds": np.arange(1.0, 77.0)}
    (tmp_path / "x.normalizer").write_bytes(pickle.dumps(stored))
    (snippet,) = re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    subprocess.run([sys.executable, "-c", snippet, "x.normalizer"], cwd=tmp_path, env=environment, check=True)
    content = json.loads((tmp_path / "mimic3.json").read_text())
    changed = [i for i, (mean, std) in enumerate(zip(content["mean"], content["std"])) if (mean, std) != (0, 1)]
    assert changed == [i for i, name in enumerate(schema.CHANNELS) if "->" not in name] and len(changed) == 12
    assert all(content["mean"][i] == i and content["std"][i] == i + 1 for i in changed)
