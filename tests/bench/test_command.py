"""`python -m medfuse_jax.bench`: what it needs, what it refuses, what it writes."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from medfuse_jax.bench import __main__ as command
from medfuse_jax.bench import cases, machine
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]

# Hides some packages, as on a machine without them.
_HIDING = """
import runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

HIDDEN = {hidden!r}
sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
sys.argv = ["bench"] + {arguments!r}
runpy.run_module("medfuse_jax.bench", run_name="__main__")
"""
_NOT_NEEDED = (
    *("ml_collections", "orbax", "grain", "polars", "sklearn", "tensorflow_datasets", "array_record"),
    *("torch", "matplotlib", "PIL", "tqdm", "tensorboardX", "data_prep"),
)


def _bench(*arguments: str, hidden=()) -> subprocess.CompletedProcess:
    code = _HIDING.format(hidden=tuple(hidden), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)


def test_needs_only_jax_flax_optax_and_numpy(tmp_path):
    json_file = tmp_path / "new" / "bench.json"
    done = _bench("--repeats=1", "--only=^(step|feed|lstm)", f"--json={json_file}", hidden=_NOT_NEEDED)
    assert done.returncode == 0, done.stderr
    assert "grain is not installed" in done.stderr
    rows = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert [(row["settings"]["kind"], row["contender"]) for row in rows] == [
        ("step", "ours"),
        ("lstm", "ours"),
        ("lstm", "plain_scan"),
    ]
    assert all(row["environment"]["jax"] == jax.__version__ and row["input"] == "made up" for row in rows)
    assert str(tmp_path) not in json_file.read_text(), "a record names no folder"
    assert done.stdout.count("samples/s") == 3


def test_hidden_packages_cannot_be_imported():
    done = _bench(hidden=["jax"])
    assert done.returncode and "No module named 'jax'" in done.stderr


@pytest.mark.parametrize("argument", ["--preset=h20", "--json=/dev/null/x.json", "--repeats=0"])
def test_wrong_argument_is_refused_in_one_line_before_jax_starts(argument):
    done = _bench(argument, hidden=["jax"])
    assert done.returncode and argument.partition("=")[0].strip("-") in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def _choose(**flags):
    values = {"preset": "tiny", "only": None, "repeats": None, "warm_up": None, "trials": None, "precision": None}
    return command._choose(types.SimpleNamespace(**{**values, "ours_only": False, **flags}))[0]


@pytest.mark.parametrize("pattern", ["no such case", "("])
def test_only_must_match_a_case(pattern):
    with pytest.raises(UserError) as error:
        _choose(only=pattern)
    assert (error.value.field, error.value.value) == ("--only", pattern)


def test_flags_change_the_cases():
    (case,) = _choose(only="^trials", repeats=2, trials=3, ours_only=True)
    assert (case.kind, case.repeats, case.num_trials, case.peers, case.warm_up) == ("trials", 2, 3, (), 1)


def test_case_for_more_devices_than_there_are_is_left_out():
    assert command._why_not(cases.Case(num_devices=len(jax.local_devices()) + 1)).startswith("it needs")
    assert command._why_not(cases.Case()) == ""


def test_environment_has_what_a_repeat_needs_and_names_no_folder():
    environment = machine.environment()
    assert {"jax", "flax", "commit", "device", "cores", "cpu", "variables"} <= environment.keys()
    assert str(_ROOT) not in json.dumps(environment)


@pytest.mark.slow
def test_every_kind_of_case_runs_and_its_records_make_a_page(tmp_path):
    """With the PyTorch peers where torch is installed, and the processes of the first step."""
    records = tmp_path / "results" / "2026-01-01_tiny" / "tiny.json"
    bench = ["medfuse_jax.bench", "--preset=tiny", "--repeats=1", f"--json={records}"]
    page = ["medfuse_jax.bench.page", f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'PAGE.md'}"]
    for module in (bench, page):
        done = subprocess.run([sys.executable, "-m", *module], cwd=_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert {row["settings"]["kind"] for row in rows} == {case.kind for case in cases.preset("tiny")[0]}
    peers = {row["contender"] for row in rows} & set(cases.PEERS)
    assert peers == (set(cases.PEERS) if importlib.util.find_spec("torch") else set())
    assert "2026-01-01_tiny" in (tmp_path / "PAGE.md").read_text()
