"""The programs that `bench.compiled` compiles are those of a run; what it refuses; the real compilers, if installed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import parallel
from medfuse_jax import run as run_lib
from medfuse_jax.bench import cohort, compiled, compilers, programs
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib

_ROOT = Path(__file__).parents[2]
_SMALL = {"rows": 4, "images": 2, "time_steps": 5, "resnet_stage_sizes": (1, 1, 1, 1)}


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    # The flags of conftest are for the CPU's compiler, and another one may not know them.
    environment = {**os.environ, "XLA_FLAGS": "", **variables}
    command = [sys.executable, "-m", "medfuse_jax.bench.compiled", *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("method", "images"), [("medfuse", 2), ("medfuse", 0), ("uni_ehr", 2), ("uni_cxr", 4)])
def test_arguments_are_the_shapes_of_a_runs_step(method, images):
    _, (state, batch, key) = compiled.train_step("cpu", method, **{**_SMALL, "images": images})
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((state, batch, key)))
    assert key.dtype == jax.eval_shape(lambda: jax.random.key(0)).dtype
    has_cxr_N = np.arange(4) < images
    data = cohort.of_stays(np.full(4, 5, np.int32), has_cxr_N, method, "radiology" if method == "uni_cxr" else "pheno")
    assert ("image" in batch) == (method != "uni_ehr" and images > 0) and ("ehr" in batch) == (method != "uni_cxr")
    plan = plan_lib.train_plan(
        data.lengths("train"),
        data.paired("train"),
        data.usable("train"),
        batch_size=4,
        seed=0,
        epoch=1,
        buckets=data.buckets,
    )
    read = batches.read(data, "train", plan_lib.deal(plan, 0, len(jax.local_devices())), int(plan.padded_length_S[0]))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in read.items()}


def test_the_options_are_those_of_a_run_with_the_default_config():
    on = jax.local_devices()
    program = programs.step(on, programs.Sizes(dtype="bfloat16", **_SMALL))
    config = config_lib.default()
    config.precision, config.model.resnet_stage_sizes = "bfloat16", (1, 1, 1, 1)
    assert program.run.options == run_lib.step_options(config, program.run.dataset, (), on)


@pytest.mark.nightly
def test_the_step_computes_what_a_run_computes():
    jitted, args = compiled.train_step("cpu", dtype="float32", **_SMALL)
    program = programs.step(jax.local_devices(), programs.Sizes(dtype="float32", **_SMALL))
    on = program.run.devices
    numbers = [np.ones(x.shape, x.dtype) for x in jax.tree.leaves(args[1])]
    batch = parallel.divide(jax.tree.unflatten(jax.tree.structure(args[1]), numbers), on)
    key = jax.random.key(0)

    def state():
        return parallel.replicate(program.run.fresh_state(), on)

    _, expected = parallel.compile_train(program.run.options, "pmap", on)(state(), batch, key)
    traced = jitted.trace(*args)
    _, metrics = traced.lower().compile()(state(), batch, parallel.replicate(key, on))
    np.testing.assert_array_equal(metrics["loss"], expected["loss"])


def test_arguments_on_one_device_make_a_program_for_that_device():
    jitted, args = compiled.train_step("cpu", "uni_ehr", **_SMALL)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), args)
    lowered = jitted.trace(*placed).lower()
    assert "all_reduce" not in lowered.as_text() and "all_reduce" in jitted.trace(*args).lower().as_text()
    assert "tensor<1x4x5x76xf32>" in lowered.as_text()  # all rows of the batch


def test_the_step_lowers_as_a_jitted_function_does():
    jitted, args = compiled.train_step("cpu", "uni_ehr", **_SMALL)
    assert jitted.lower(*args).as_text() == jitted.trace(*args).lower().as_text()


def test_figures_of_a_program_that_fits_and_of_one_that_does_not():
    target = compilers.open_target("cpu")
    case = compiled.Case("", programs.step, programs.Sizes(**_SMALL), "host")
    state = programs.step(target.devices, case.sizes).run.abstract_state()
    row = compiled.measure(case, target)
    assert row["fits"] and row["devices"] == len(target.devices)
    assert row["argument_bytes"] > 3 * 4 * sum(x.size for x in jax.tree.leaves(state.params))  # weights and two moments
    assert row["collectives_written"] > 10 and row["flops"] > 1e9
    small = compilers.Target("cpu", target.devices, compilers.Chip(1e6, 1e9, 1e9))
    row = compiled.measure(dataclasses.replace(case, sizes=programs.Sizes("uni_ehr", **_SMALL)), small)
    assert not row["fits"] and row["rows_per_s_device"] == pytest.approx(4 / len(target.devices) / row["ms"] * 1000)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.24G of 15.75G hbm.",
        "RESOURCE_EXHAUSTED: the memory required for HLO temporaries (21.24G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_is_said_in_numbers(message):
    assert compiled._refused(message) == "21.24G of 15.75G"
    assert compiled._refused("RESOURCE_EXHAUSTED:\nno memory") == "RESOURCE_EXHAUSTED: no memory"


@pytest.mark.parametrize("target", ["h100", "v5e", "v5e:", "v5e:0x2", "h200:", "h200:9", "h200:2x2x1", "", "tpu"])
def test_a_target_that_does_not_exist_is_refused(target):
    with refused(field="--target", value=target):
        compilers.open_target(target)


@pytest.mark.parametrize("target", ["h200", "v5e:2x2x1"])
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(target, tmp_path, monkeypatch):
    monkeypatch.setenv(compilers.VARIABLE, str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(compilers.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with refused(field="--target", value=target, path=tmp_path) as error:
        compilers.open_target(target)
    version = compilers.importlib.metadata.version("jaxlib")
    command = str(error.value).partition("pip install")[2]
    assert f"--target={tmp_path}" in command and f"jax-cuda12-plugin=={version}" in command and "libtpu==" in command
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rows": 3}, "config.batch_size"),  # does not divide over two devices
        ({"images": 5}, "config.images_per_batch"),
        ({"images": 0, "method": "uni_cxr"}, "--images"),
        ({"method": "medfuze"}, "config.method"),
        ({"resnet_stage_sizes": (1, 1)}, "config.model.resnet_stage_sizes"),
        ({"time_steps": 0}, "--time_steps"),
    ],
)
def test_sizes_that_no_run_could_have_are_refused(changes, field):
    with refused(field=field):
        compiled.train_step("cpu", **_SMALL | changes)


def test_the_command_prints_and_records_each_case(tmp_path):
    done = _run("--target=cpu", "--quick", "--case=lstm", f"--json={tmp_path / 'new' / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert row["case"] == "lstm" and row["sizes"]["resnet_stage_sizes"] == [1, 1, 1, 1]
    title, figures, loops = done.stdout.splitlines()
    assert f"{row['kernels']:,}" in figures and "GFLOP" in title and " x " in loops
    outer = [loop for loop in row["loops"] if loop["depth"] == 0]
    assert row["kernels"] == row["kernels_outside_loops"] + sum(loop["trips"] * loop["launches"] for loop in outer)
    assert sum(loop["trips"] == 16 for loop in outer) == 4  # two layers, forward and backward, in chunks of four steps


def test_the_command_does_not_need_ml_collections():
    hide = "import runpy, sys; sys.modules['ml_collections'] = sys.modules['grain'] = None; "
    code = hide + "sys.argv = ['compiled', '--target=cpu', '--quick', '--case=augment']; "
    code += "runpy.run_module('medfuse_jax.bench.compiled', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "augmentation, 16 X-rays" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--target=v9e:2x2"], ["--target=cpu", "--case=stem"], ["--target=cpu", "--case=hosts"]]
)
def test_a_wrong_flag_is_one_line(arguments):
    done = _run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def _why_no_compiler(target: str) -> str:
    found = (compilers.folder() / ("libtpu" if target != "h200" else "jax_plugins")).exists()
    return "" if found else f"no compilers in {compilers.folder()} ({compilers.VARIABLE}): {compilers.how_to_install()}"


@pytest.mark.parametrize("target", ["h200", "v5e:2x2x1"])
def test_the_real_compilers_count_the_recurrence(target, tmp_path):
    if reason := _why_no_compiler(target):
        pytest.skip(reason)
    done = _run(f"--target={target}", "--quick", "--case=lstm", f"--json={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "figures.json").read_text())
    assert row["fits"] and row["kernels"] > 16 and row["bytes"] > 1e6
    assert row["argument_bytes"] > 4 * 1024 * (76 + 3 * 256)  # the weights of both layers
    assert ("ms" in row) == (target != "h200")
    if target == "h200":  # Pallas: one CUDA graph
        assert row["launches"] == row["graphs"] == 1 and row["kernels_in_graphs"] == row["kernels"]


def test_the_real_compiler_refuses_a_slice_that_does_not_exist():
    if reason := _why_no_compiler("v5e:3x3"):
        pytest.skip(reason)
    done = _run("--target=v5e:3x3")
    assert done.returncode == 2 and done.stderr.count("error: --target=v5e:3x3") == 1 and "Traceback" not in done.stderr
