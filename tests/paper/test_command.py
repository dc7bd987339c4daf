"""The command as a user runs it: what it trains, how it resumes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _run(*given, status=0):
    command = [sys.executable, "-m", "medfuse_jax.paper", *map(str, given)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(shards, tmp_path):
    printed = _run(f"--data={shards}", f"--out={tmp_path / 'paper'}", "--dry_run", "--noestimate")
    assert "293 trainings in" in printed and "starts from E1 and E0" in printed
    assert not (tmp_path / "paper").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "--data is missing"),
        (["--data=nowhere"], "nowhere"),
        (["--preset=huge"], "--preset"),
        (["--tasks=sepsis", "--data=x"], "--tasks"),
        (["--folds=1", "--data=SHARDS"], "--folds"),
        (["--out=SHARDS", "--data=SHARDS"], "another --out"),
        (["--folds=1000", "--data=SHARDS"], "patients: use fewer folds"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(given, expected, shards, tmp_path):
    given = [flag.replace("SHARDS", str(shards)) for flag in given]
    message = _run(f"--out={tmp_path}", *given, status=2)
    assert expected in message and message.count("\n") == 1


def test_a_dry_run_names_the_seeds_and_folds(shards, tmp_path):
    out = tmp_path / "paper"
    printed = _run(f"--data={shards}", f"--out={out}", "--dry_run", "--noestimate", "--seeds=2", "--folds=3")
    assert f"each 6 times, for 2 seeds and 3 folds of the patients, in {out}" in printed
    assert not out.exists()


@pytest.mark.nightly
def test_two_seeds_give_the_mean_and_spread_of_every_table(shards, tmp_path):
    given = ("--preset=smoke", f"--data={shards}", "--tasks=pheno", "--methods=lstm", "--noestimate", "--trials=1")
    _run(*given, f"--out={tmp_path}", "--seeds=2")
    whole, *each = (json.loads((tmp_path / of / "paper.json").read_text()) for of in ("", "seed0", "seed1"))
    rows = [next(t for t in content["tables"] if t["name"] == "table_1")["rows"] for content in (whole, *each)]
    for of_whole, *of_each in zip(*rows):
        values = [row[3]["value"] for row in of_each]
        assert of_whole[3]["value"] == pytest.approx(sum(values) / 2)
        assert of_whole[3]["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "±" in (tmp_path / "index.html").read_text()
    message = _run(*given, f"--out={tmp_path}", status=2)
    assert "--out" in message and message.count("\n") == 1


@pytest.mark.nightly
def test_the_command_trains_resumes_and_refuses_another_plan(shards, tmp_path):
    out = tmp_path / "paper"
    given = (
        "--preset=smoke",
        f"--data={shards}",
        f"--out={out}",
        "--tasks=pheno",
        "--methods=lstm",
        "--noestimate",
    )
    _run(*given)
    (checkpoint,) = (out / "runs" / "pheno" / "E2" / "trials").glob("*/result.json")
    content = json.loads((out / "paper.json").read_text())
    assert {"table_1", "table_a1"} <= {t["name"] for t in content["tables"]} and content["synthetic"]
    rows = content["tables"][1]["rows"]
    assert [row[0] for row in rows if "chosen on paired" not in row[0]] == ["LSTM"] * 3
    assert all(0 <= row[3]["value"] <= 1 for row in rows)

    written = os.stat(checkpoint).st_mtime_ns
    (out / "index.html").unlink()
    assert "epoch" not in _run(*given) and (out / "index.html").exists()  # nothing is trained again
    assert os.stat(checkpoint).st_mtime_ns == written

    message = _run(*given, "--trials=1", status=2)
    assert "holds another plan" in message and message.count("\n") == 1
