"""Train for hours with a kill or a signal every few minutes, beside an undisturbed run, and compare the two.

    PYTHONPATH=.:tests python -m reliability.endurance --minutes=120 --seed=0 --dir=DIR [--stays=4000] [--json=FILE]

--stays, --width and --save_every set the length of an epoch, and how many steps a kill may cost. The epoch to end with
is chosen when the time is over, so that the length does not depend on the machine. Prints one line a life of the
process and, as JSON, what came of them: docs/reliability.md.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from reliability import signals
from sweep_commands import ROOT, write_config

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_ENDLESS = 10**6  # epochs
_MOST_AHEAD = 4  # epochs: the undisturbed run waits for the other
_FEWEST = 5  # epochs of a life whose memory is compared
# Run `main` until the epoch in the file LAST, which is written while it trains.
_MAIN = f"""
import pathlib, runpy
from medfuse_jax.runs import progress
last, usual = pathlib.Path({{last!r}}), progress.Progress.is_finished
def is_finished(self, config):
    is_endless = config.num_epochs == {_ENDLESS}
    return is_endless and last.exists() and self.epoch >= int(last.read_text()) or usual(self, config)
progress.Progress.is_finished = is_finished
runpy.run_module("medfuse_jax.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass
class Life:
    """One process of a run. rss: epochs that it has validated -> bytes of memory when that was first seen."""

    process: subprocess.Popen
    workdir: Path
    first_epoch: int
    rss: dict[int, int] = dataclasses.field(default_factory=dict)

    def look(self) -> None:
        """Note how much memory the process uses now."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended
            return
        done = max(epoch(self.workdir) - self.first_epoch, 0)
        if pages:
            self.rss.setdefault(done, pages * os.sysconf("SC_PAGE_SIZE"))


def epoch(workdir: Path) -> int:
    """Return the last validated epoch."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines()[-3:] if path.exists() else []
    found = [0]
    for line in lines:
        try:
            found.append(json.loads(line)["epoch"] - (json.loads(line)["phase"] == "train"))
        except (ValueError, KeyError, TypeError):  # being written
            continue
    return max(found)


def start(config: Path, workdir: Path) -> Life:
    workdir.parent.mkdir(parents=True, exist_ok=True)
    script = _MAIN.format(last=str(workdir.parent / "last_epoch"))
    command = [sys.executable, "-c", script, f"--config={config}", f"--workdir={workdir}"]
    with workdir.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return Life(process, workdir, epoch(workdir))


def content(config: Path, workdir: Path) -> dict:
    """Return what is compared: scores, validations, and the SHA-256 of the best and the last state."""
    notes = [json.loads(path.read_text()) for path in workdir.glob("checkpoints/*/note/metadata")]
    kept = {note["step"]: (note["state_sha256"], note["progress"]) for note in notes}
    best = max(note["step"] for note in notes if note["is_best"])
    made = signals.of_main(config).content(workdir)
    return made | {"best": (best, kept[best]), "last": (max(kept), kept[max(kept)])}


def endure(config: Path, folder: Path, minutes: float, between_s: tuple[float, float], seed: int) -> dict:
    """Train both runs for so many minutes and to the same epoch; return the counts and what differs."""
    draw, start_s = random.Random(seed), time.monotonic()
    undisturbed, lives = start(config, folder / "undisturbed"), [start(config, folder / "disturbed")]
    counts: collections.Counter = collections.Counter()
    wrong, is_over = [], False
    end_s = time.monotonic() + draw.uniform(*between_s)
    while not is_over or lives[-1].process.poll() is None or undisturbed.process.poll() is None:
        time.sleep(1)
        life = lives[-1]
        for looked in (life, undisturbed):
            looked.look()
        if not is_over:
            ahead = epoch(undisturbed.workdir) - epoch(life.workdir)
            if ahead > _MOST_AHEAD or ahead <= 0:
                undisturbed.process.send_signal(signal.SIGSTOP if ahead > 0 else signal.SIGCONT)
        if not is_over and time.monotonic() > start_s + 60 * minutes:
            is_over = True
            last = max(epoch(undisturbed.workdir), epoch(life.workdir)) + 2
            (folder / "last_epoch").write_text(str(last))
            undisturbed.process.send_signal(signal.SIGCONT)
        if not is_over and (time.monotonic() > end_s or life.process.poll() is not None):
            wrong += _end(life, draw.choice(_SIGNALS), counts)
            lives.append(start(config, folder / "disturbed"))
            end_s = time.monotonic() + draw.uniform(*between_s)
    statuses = [lives[-1].process.returncode, undisturbed.process.returncode]
    made = {workdir.name: content(config, workdir) for workdir in (undisturbed.workdir, lives[-1].workdir)}
    expected, found = made["undisturbed"], made["disturbed"]
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return {
        "minutes": round((time.monotonic() - start_s) / 60, 1),
        "epochs": epoch(lives[-1].workdir),
        "statuses": statuses,
        "sent": dict(counts),
        "wrong": wrong,
        "differ": differ,
        "best": expected["best"][0],
        "last": expected["last"][0],
        "undisturbed_mb": memory(undisturbed),
        "lives_mb": [memory(life) for life in lives],
        "log": (folder / "disturbed.log").read_text().count("\n"),
    }


def _end(life: Life, number: signal.Signals, counts: collections.Counter) -> list[str]:
    """Send a signal to a process; return what it did that it should not have done."""
    if life.process.poll() is not None:
        return [f"ended by itself with {life.process.returncode}"]
    before = life.workdir.with_suffix(".log").stat().st_size
    status, took_s = signals._send(life.process, number)
    counts[number.name] += 1
    printed = life.workdir.with_suffix(".log").read_text()[before:]
    print(f"epoch {epoch(life.workdir)}: {number.name}: {status}, {took_s:.1f} s: {printed.strip()[-100:]}", flush=True)
    expected = -number if number == signal.SIGKILL else 1
    return [f"{number.name}: {status}: {printed[-500:]}"] if status != expected or "Traceback" in printed else []


def memory(life: Life) -> dict:
    """Return the megabytes of a process: each tenth's median, the third's (settled) and the last one's, and the most.

    settled: after a fifth of the epochs. most: after that.
    """
    mb = [life.rss[epochs] / 1e6 for epochs in sorted(life.rss) if epochs]
    if len(mb) < _FEWEST:
        return {"epochs": len(mb)}
    tenths = [round(float(np.median(tenth)), 1) for tenth in np.array_split(mb, 10) if len(tenth)]
    fifth = len(mb) // 5
    settled, last = mb[fifth : max(3 * len(mb) // 10, fifth + 1)], mb[-max(len(mb) // 10, 1) :]
    found = {"settled": np.median(settled), "most": max(mb[fifth:]), "last": np.median(last)}
    return {"epochs": max(life.rss)} | {name: round(float(v), 1) for name, v in found.items()} | {"tenths": tenths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--between_s", default="120,240", help="shortest,longest seconds from a start to its end")
    parser.add_argument("--stays", type=int, default=400, help="of the synthetic cohort")
    parser.add_argument("--width", type=int, default=8, help="of the LSTMs, and twice the width of the ResNet")
    parser.add_argument("--save_every", type=int, default=0, help="config.checkpoint_every_steps")
    parser.add_argument("--json", type=Path, help="where to write the result too")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it
    shards = signals.shards(given.dir, given.stays)
    fields: dict = {"method": "medfuse", "placement": "stream", "early_stop_epochs": _ENDLESS}
    fields["model"] = {"ehr_hidden": given.width, "fusion_hidden": given.width, "resnet_width": given.width // 2}
    fields["checkpoint_every_steps"] = given.save_every
    fields["plateau_epochs"] = _ENDLESS  # else the rate would be halved to nothing, and all later states the same
    fields["pretrain"] = {"cxr": {"method": "uni_cxr", "task": "radiology", "num_epochs": 2}}
    config = write_config(given.dir, shards, _ENDLESS, fields)
    least_s, most_s = map(float, given.between_s.split(","))
    settings = {name: getattr(given, name) for name in ("seed", "stays", "width", "save_every")}
    result = settings | endure(config, given.dir, given.minutes, (least_s, most_s), given.seed)
    text = json.dumps(result)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    sys.exit(bool(result["differ"] or result["wrong"] or any(result["statuses"])))


if __name__ == "__main__":
    main()
