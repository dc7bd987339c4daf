"""Send signals to commands at random times, resume them, and compare what they make with undisturbed runs.

    PYTHONPATH=.:tests python -m reliability.signals --signals=200 --seed=0 --dir=DIR [--commands=build,main,sweep]

With --within_s=8, it attacks how they start. Prints one line a signal and, as JSON, what came of them:
docs/reliability.md.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sweep_commands import ROOT, write_config

LIMIT_S = 30.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Attacked:
    """A command to attack. Of a folder to write, arguments: the command's; content: what it has made there, to compare.

    environment: variables to change.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    content: Callable[[Path], dict]
    environment: Callable[[Path], dict[str, str]] = lambda out: {}


def of_build(raw: Path) -> Attacked:
    """The build of a raw tree with X-rays."""

    def content(out: Path) -> dict:
        files = (path for path in sorted(out.rglob("*")) if path.is_file() and ".cache" not in path.parts)
        return {str(path.relative_to(out)): path.read_bytes() for path in files}

    flags = [f"--mimic_iv={raw / 'mimic-iv'}", f"--mimic_cxr={raw / 'mimic-cxr'}"]
    return Attacked("build", lambda out: ["data_prep.build", *flags, f"--out={out}"], content)


def of_main(config: Path) -> Attacked:
    """A run of `main`, with its pre-training, scores and report."""

    def content(folder: Path) -> dict:
        made = {}
        for path in sorted(folder.rglob("predictions_test.npz")):
            with np.load(path) as stored:
                made |= {f"{path.parent.relative_to(folder)}/{name}": stored[name].tobytes() for name in stored.files}
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        validated = [[line[k] for k in ("epoch", "step", "val_loss")] for line in lines if line["phase"] == "val"]
        return made | {"validated": validated, "report": (folder / "report" / "index.html").exists()}

    return Attacked("main", lambda out: ["medfuse_jax.main", f"--config={config}", f"--workdir={out}"], content)


def of_sweep(config: Path) -> Attacked:
    """A sweep of two trials at once, and the score of the chosen one."""

    def content(folder: Path) -> dict:
        (result,) = folder.glob("trials/*/result.json")
        scores = json.loads(result.read_text())["subsets"]
        return {"table": (folder / "sweep.csv").read_text(), "chosen": result.parent.name, "scores": scores}

    flags = [f"--config={config}", "--trials=2", "--lanes=1", "--search=lr:loguniform(1e-3,1e-2)"]
    return Attacked("sweep", lambda out: ["medfuse_jax.sweep", *flags, f"--workdir={out}"], content)


def of_report(run: Path) -> Attacked:
    """The report on a run."""

    def content(out: Path) -> dict:
        return {"page": (out / "index.html").read_text().partition("<footer>")[0]}  # which says when it was written

    return Attacked("report", lambda out: ["medfuse_jax.report", f"--runs={run}", f"--out={out}"], content)


def of_cache(config: Path) -> Attacked:
    """A run that builds its cohort in the user's cache folder, where compiled programs are kept too."""
    of_run = of_main(config)
    return Attacked(
        "cache",
        lambda out: of_run.arguments(out / "run"),
        lambda out: of_run.content(out / "run"),
        lambda out: {"XDG_CACHE_HOME": str(out / "cache")},
    )


def attack(
    attacked: Attacked, folder: Path, num_signals: int, seed: int, within_s: float | None = None, say: Callable = print
) -> dict[str, int]:
    """Send signals to a command, resume it after each, and start anew when it has ended; return counts.

    within_s: seconds from a start to its signal at most; by default those that the whole command takes.
    obeyed: ended within 30 s. finished: it had just done its work. hangs, tracebacks, losses (results that differ from
    the undisturbed run's, or a step that is said to be saved and is not) are failures.
    """
    draw = random.Random(seed)
    for name in ("first", "undisturbed"):  # the first run compiles
        start_s = time.monotonic()
        assert run(attacked, folder / name).wait() == 0, (folder / "log").read_text()[-3000:]
    longest_s = time.monotonic() - start_s
    expected = attacked.content(folder / "undisturbed")
    assert attacked.content(folder / "first") == expected
    counts = collections.Counter(dict.fromkeys(("obeyed", "finished", "hangs", "tracebacks", "losses"), 0))
    times_s, out, left = [], folder / "disturbed", num_signals
    while left or out.exists():
        number, delay_s = draw.choice(_SIGNALS), draw.uniform(0, within_s or longest_s)
        process = run(attacked, out)
        if not left:
            delay_s = 10 * longest_s + 600  # to its end
        try:
            status = process.wait(delay_s)
        except subprocess.TimeoutExpired:
            if not left:
                process.kill()
                counts["hangs"] += 1
                break
            left -= 1
            status, took_s = _send(process, number)
            times_s.append(took_s)
            text = (folder / "log").read_text()
            outcome = "hangs" if status is None else "obeyed" if status else "finished"
            counts[outcome] += 1
            counts["tracebacks"] += "Traceback" in text and status not in (-signal.SIGINT, -signal.SIGTERM)
            lost = [s for s in re.findall(r"step (\d+) is saved", text) if not list(out.rglob(f"checkpoints/{s}"))]
            counts["losses"] += bool(lost)
            counts[f"in {_phase(attacked, out)}"] += 1
            last = (text.strip().splitlines() or [""])[-1]
            say(f"{attacked.name} {number.name} after {delay_s:.1f} s: {outcome} ({status}, {took_s:.1f} s): {last}")
        if status == 0:
            same = attacked.content(out) == expected
            counts["completed"] += 1
            counts["losses"] += not same
            if not same:
                say(f"{attacked.name}: the result differs from the undisturbed run's: {out}.differs")
                shutil.copytree(out, f"{out}.differs", dirs_exist_ok=True)
            shutil.rmtree(out)
        elif status not in (1, -signal.SIGTERM, -signal.SIGINT, None):
            counts["other statuses"] += 1
            say(f"{attacked.name} ended with {status}: {(folder / 'log').read_text()[-2000:]}")
            if status == 2:
                break
    return dict(counts) | {"longest_s": round(max(times_s, default=0.0), 1)}


def run(attacked: Attacked, out: Path, log: Path | None = None) -> subprocess.Popen:
    """Start the command. log: where its output goes, by default beside `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (log or out.parent / "log").open("w") as file:
        command = [sys.executable, "-m", *attacked.arguments(out)]
        environment = os.environ | attacked.environment(out)
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _send(process: subprocess.Popen, number: signal.Signals) -> tuple[int | None, float]:
    """Send a signal; return the exit status, None for a process that had to be killed, and the seconds that it took."""
    start_s = time.monotonic()
    process.send_signal(number)
    try:
        status = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
    return status, time.monotonic() - start_s


def _phase(attacked: Attacked, out: Path) -> str:
    """Return what the command was doing, by the files that are there."""
    if attacked.name == "build":
        done = len(list(out.glob("*/manifest.json")))
        return f"build, {done} tasks done" if (out / ".cache").exists() else "start"
    if not any(out.rglob("config.json")) and not (out / "sweep.json").exists():
        return "start"
    if any(out.glob("result.json")) or (out / "sweep.csv").exists():
        return "results"
    return "training" if any(out.rglob("metrics.jsonl")) else "opening"


def shards(folder: Path, stays: int = 400) -> Path:
    """Build a synthetic cohort in the folder, unless it is there; return its shards."""
    raw, built = folder / "raw", folder / "shards"
    if not built.exists():
        for command in (["data_prep.synthetic", f"--out={raw}", f"--stays={stays}"], of_build(raw).arguments(built)):
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    return built


def commands(folder: Path, num_epochs: int, method: str) -> dict[str, Callable[[], Attacked]]:
    """Return the commands by name, to be made when they are needed; build what they read in the folder.

    report: on the run that an attack on main has left, undisturbed.
    """
    raw, built = folder / "raw", shards(folder)
    for name in ("swept", "cached"):
        (folder / name).mkdir(exist_ok=True)
    # Streamed, so that the reader's threads are attacked too.
    fields: dict = {"method": method, "placement": "stream", "early_stop_epochs": 100}
    if method != "uni_ehr":
        fields["pretrain"] = {"cxr": {"method": "uni_cxr", "task": "radiology", "num_epochs": 2}}
    return {
        "build": lambda: of_build(raw),
        "main": lambda: of_main(write_config(folder, built, num_epochs, fields)),
        "report": lambda: of_report(folder / "main_disks" / "undisturbed"),
        "cache": lambda: of_cache(write_config(folder / "cached", "", num_epochs, {"data": {"synthetic_stays": 60}})),
        "sweep": lambda: of_sweep(write_config(folder / "swept", built, num_epochs, {"early_stop_epochs": 100})),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--within_s", type=float, help="the latest second of a signal, to attack how commands start")
    parser.add_argument("--commands", default="build,main,sweep")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--method", default="medfuse", help="of the run: uni_ehr is the fastest")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a start then compiles nothing
    attacked, names = commands(given.dir, given.epochs, given.method), given.commands.split(",")
    for name in names:
        counts = attack(attacked[name](), given.dir / name, given.signals // len(names), given.seed, given.within_s)
        print(json.dumps({"command": name, "seed": given.seed, **counts}), flush=True)


if __name__ == "__main__":
    main()
