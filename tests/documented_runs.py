"""Runs documented commands in a copy of the repository, as a reader would type them, at the smallest sizes.

`as_run` fills in what a document leaves to the reader and adds flags for size; `Workspace.done` first makes what a
command reads, by the documented command that writes it, and runs every command once for all test processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import documented
import numpy as np
import yaml
from documented import Command

from medfuse_jax import records, schema
from medfuse_jax.models import registry

STAYS = 200
_TIMEOUT_S = 600
_SIZES = (
    "--config.image.resize_px=32",
    "--config.image.crop_px=32",
    "--config.model.ehr_hidden=8",
    "--config.model.fusion_hidden=8",
    "--config.model.resnet_width=4",
    "--config.model.resnet_stage_sizes=(1,1,1,1)",
    "--config.data.max_buckets=1",
    "--config.num_epochs=1",
    "--config.eval.num_bootstrap=20",
)
# What stands for the reader's own.
_FILLED = {
    "--mimic_iv=DIR": "--mimic_iv=raw/mimic-iv",
    "--mimic_cxr=DIR": "--mimic_cxr=raw/mimic-cxr",
    "--config.data.dir=DIR": "--config.data.dir=shards",
    "--config.model.modalities=FILE": "--config.model.modalities=notes.py",
    "--workdir=DIR": "--workdir=runs/pheno",
    "--data_dir=NEW": "--data_dir=moved/shards",
    "--runner=...": "--runner=DirectRunner",
}
_OUT = {"data_prep.build": "shards", "data_prep.images.beam": "images", "data_prep.bench": "benchmark"}
# The quickest case of each benchmark preset, as a pattern for --only.
SMALLEST = {
    "cpu": "uni_ehr",
    "h200": "lstm.*B=16",
    "growth": "uni_ehr B=16 4 h",
    "devices": "2 devices$",
    "sweeps": "sweep early",
}
_RAW = ("--mimic_iv=raw/mimic-iv", "--mimic_cxr=raw/mimic-cxr")
# What documents say in words, or take as given: the raw tables, and released weights of single encoders.
_UNDOCUMENTED = [
    Command("data_prep/synthetic/tree.py", "data_prep.synthetic", ("--out=raw", f"--stays={STAYS}")),
    Command(
        "docs/data.md",
        "data_prep.build",
        (*_RAW, "--out=hourly", "--tasks=decompensation,length_of_stay", "--seed=1", "--workers=1"),
    ),
    Command("docs/data.md", "medfuse_jax.evaluate", ("--workdir=runs/pheno", "--split=val", "--drop_ehr=0.5")),
    Command("docs/data.md", "data_prep.build", (*_RAW, "--out=strict", "--profile=strict")),
    Command("README.md", "data_prep.build", (_RAW[0], "--out=ehr_alone")),
    *(
        Command(
            "README.md",
            "medfuse_jax.main",
            (
                "--config=configs/pheno.py",
                "--config.method=uni_ehr",
                f"--config.data.dir={shards}",
                f"--workdir=runs/{folder}",
                *_SIZES,
            ),
        )
        for shards, folder in (("ehr_alone", "ehr_alone"), ("shards", "moved"))
    ),
    Command("docs/sweeps.md", "medfuse_jax.main", ("--config=sweeps/pheno/best_config.py", "--workdir=runs/best")),
    Command(
        "docs/sweeps.md",
        "medfuse_jax.sweep",
        ("--config=listed.py", "--config.data.dir=shards", "--trials=3", "--workdir=sweeps/listed", *_SIZES),
    ),
    Command(
        "docs/performance.md",
        "medfuse_jax.main",
        (
            "--config=configs/pheno.py",
            "--config.method=uni_ehr",
            "--config.data.dir=shards",
            "--config.placement=device",
            "--config.parallel=jit",
            "--workdir=runs/jit",
            *_SIZES,
        ),
    ),
    *(
        Command("docs/weights.md", "medfuse_jax.torch_import", flags)
        for method in ("uni_ehr", "uni_cxr")
        for flags in (
            (f"--workdir=runs/{method}", f"--export={method}.safetensors"),
            (
                f"--checkpoint={method}.safetensors",
                "--config=configs/pheno.py",
                f"--config.method={method}",
                "--config.data.dir=shards",
                f"--workdir=runs/released_{method.removeprefix('uni_')}",
                *_SIZES,
            ),
        )
    ),
]
# Files that a reader has from elsewhere, made by hand below -> what they are made from.
_BY_HAND = {
    "val_ids.csv": "shards",
    "test_ids.csv": "shards",
    "notes.py": "shards",
    "moved/shards": "shards",
    "resnet34.pth": "best_checkpoint.pth.tar",
    "mimic3.json": "",
    "listed.py": "",
    "icd_9_10_definitions_2.yaml": "",
}


def all_commands() -> list[Command]:
    """The documented commands as they are run, each once, and the few that documents say in words."""
    shown = [c for c in documented.commands() if c.where.endswith(".md") or c.where.startswith("configs/")]
    found = {}
    for command in [*map(as_run, shown), *_UNDOCUMENTED]:
        # The benchmark's quickest case is the same whatever cases and file a document names; and rows that differ in
        # their learning rate alone run the same program.
        alike = tuple(flag for flag in command.flags if not flag.startswith("--config.learning_rate="))
        key = command.value("preset") or (command.module, alike)
        found.setdefault(key, command)
    return list(found.values())


def as_run(command: Command) -> Command:
    """The command with the reader's own paths, and overrides for size."""
    filled = _FILLED | ({"--workdir=DIR": "--workdir=runs/moved"} if command.value("data_dir") else {})
    flags = [filled.get(flag, flag) for flag in command.flags]
    flags = [f"--out={_OUT.get(command.module)}" if flag == "--out=DIR" else flag for flag in flags]
    more = {
        "medfuse_jax.main": _for_main,
        "medfuse_jax.sweep": _for_sweep,
        "medfuse_jax.torch_import": lambda command: _SIZES if command.value("config") else (),
        "medfuse_jax.bench": _for_bench,
        "data_prep.bench": lambda command: ("--copies=8", "--repeats=1"),
    }.get(command.module, lambda command: ())
    command = dataclasses.replace(command, flags=tuple(flags))
    return dataclasses.replace(command, flags=(*command.flags, *more(command)))


def _for_main(command: Command) -> list[str]:
    flags = list(_SIZES)
    if command.value("config") == "configs/demo.py":
        flags.append(f"--config.data.synthetic_stays={STAYS}")
        flags += [f"--config.pretrain.{name}.num_epochs=1" for name in ("ehr", "cxr")]
    elif not command.value("config.data.dir"):
        flags.append("--config.data.dir=shards")
    if command.where == "docs/methods.md" and command.value("config") != "configs/demo.py":
        unnamed = ("--config=", "--config.learning_rate=")
        values = [flag.partition("=")[2] for flag in command.flags if not flag.startswith(unnamed)]
        named = [value for value in values if value not in ("true", "false")] or [Path(command.value("config")).stem]
        flags.append(f"--workdir=runs/{'_'.join(named)}")
    if command.value("config.profile_steps"):
        flags.append("--config.num_epochs=3")  # enough steps for the documented ones
    return flags


def _for_sweep(command: Command) -> list[str]:
    if command.value("workdir") == "sweeps/pheno":
        return list(_SIZES)  # the README's sweep runs all ten trials
    return [*_SIZES, "--trials=3", *(["--round=2"] if command.value("round") else [])]


def _for_bench(command: Command) -> list[str]:
    preset = command.value("preset")
    sizes = ["--repeats=1", *(["--warm_up=0", "--trials=3"] if preset == "sweeps" else [])]
    return [f"--only={SMALLEST[preset]}", *sizes, f"--json=bench_{preset}.json"]


_WEIGHTS = (".safetensors", ".pth.tar")


def reads(command: Command) -> list[str]:
    """The paths that a command as run reads, as far as it names them."""
    names = ["mimic_iv", "mimic_cxr", "val_ids", "test_ids", "phenotypes", "checkpoint", "data_dir"]
    names += ["config.data.dir", "config.init.ehr", "config.init.cxr", "config.init.model"]
    names += (
        ["workdir"] if command.module == "medfuse_jax.evaluate" or command.value("export").endswith(_WEIGHTS) else []
    )
    found = [command.value(name) for name in names]
    found += [path.partition(":")[0] for path in command.value("runs").split(",")]
    found += [command.value("config")] if not command.value("config").startswith("configs/") else []
    found += [
        p for p in (command.value("config.data.statistics"), command.value("config.model.modalities")) if "." in p
    ]
    return [{"runs": "runs/pheno"}.get(path, path) for path in found if path]


def writes(command: Command) -> list[str]:
    """The paths that a command as run writes, as far as it names them."""
    export = command.value("export")
    if export.endswith(_WEIGHTS):
        return [export]
    names = ["out"] if command.module == "medfuse_jax.evaluate" else ["out", "workdir"]
    return [command.value(name) for name in names if command.value(name)]


def needs(command: Command, commands: list[Command]) -> list[Command]:
    """The commands to run before: what writes the paths that this one reads, and what writes to its own before it."""

    def is_in(path: str, folders: list[str]) -> bool:
        return any(path == folder or path.startswith(f"{folder}/") for folder in folders)

    read = [path for path in reads(command) if not is_in(path, writes(command))]
    read = [_BY_HAND.get(path, path) for path in read]
    before = commands[: commands.index(command)]
    makers = [c for c in commands if any(is_in(path, writes(c)) for path in read)]
    makers += [c for c in before if set(writes(c)) & set(writes(command)) and not _are_together(c, command)]
    return [c for c in dict.fromkeys(makers) if c != command]


def unmade(command: Command, commands: list[Command]) -> list[str]:
    """The paths that a command reads and nothing makes."""
    made = [path for c in commands for path in writes(c)]
    return [
        path
        for path in reads(command)
        if path not in _BY_HAND and not any(path == m or path.startswith(f"{m}/") for m in made)
    ]


def _are_together(a: Command, b: Command) -> bool:
    """Whether two commands are processes of one sweep."""
    of_all = [tuple(flag for flag in c.flags if not flag.startswith("--process=")) for c in (a, b)]
    return of_all[0] == of_all[1] and bool(a.value("process"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended. output: both streams together."""

    returncode: int
    output: str
    seconds: float


class Workspace:
    """A copy of the repository in `folder`, where commands are run and leave what they write."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.commands = all_commands()
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone("copy"):
            if not (folder / "repository").exists():
                self._copy(folder / "copying")
                (folder / "copying").rename(folder / "repository")

    @staticmethod
    def _copy(target: Path) -> None:
        """Copies what a clone holds and commands read. Pages that commands make are spoilt: they have to be made."""
        for name in ("medfuse_jax", "data_prep", "configs", "docs", "jobs", "results"):
            shutil.copytree(documented.ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in documented.ROOT.glob("*.md"):
            if path.name != "BENCHMARKS.md":
                shutil.copy(path, target)
        for name in ("methods.md", "performance.md"):
            page = target / "docs" / name
            made = re.compile(r"(<!-- made by [^>]* -->\n).*?(<!-- end -->)", re.S)
            spoilt, count = made.subn(r"\1spoilt\n\2", page.read_text())
            assert count == 1, name
            page.write_text(spoilt)

    @property
    def root(self) -> Path:
        return self.folder / "repository"

    def done(self, command: Command) -> Outcome:
        """Run the command unless it has run, after what it needs; return how it ended."""
        together = [c for c in self.commands if c == command or _are_together(c, command)]
        key = hashlib.sha256(str(together[0]).encode()).hexdigest()[:16]
        with self._alone(key):
            path = self.folder / f"{key}.json"
            if not path.exists():
                for need in dict.fromkeys(need for c in together for need in needs(c, self.commands)):
                    outcome = self.done(need)
                    assert outcome.returncode == 0, f"before it, {need}\n{outcome.output[-3000:]}"
                for part in reads(command):
                    self._make_by_hand(part)
                outcomes = {str(c): dataclasses.asdict(o) for c, o in zip(together, self._run(together))}
                path.write_text(json.dumps(outcomes))
            return Outcome(**json.loads(path.read_text())[str(command)])

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keeps other test processes out of the block until it ends."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _run(self, together: list[Command]) -> list[Outcome]:
        start_s, port = time.perf_counter(), _free_port()
        running = []
        for command in together:
            flags = [re.sub(r"HOST:\d+$", f"localhost:{port}", flag) for flag in command.flags]
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", command.module, *flags],
                    cwd=self.root,
                    env=self._environment(command),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        seconds = time.perf_counter() - start_s
        return [Outcome(process.returncode, output, seconds) for process, output in zip(running, outputs)]

    def _environment(self, command: Command) -> dict[str, str]:
        """The reader's: no simulated devices. Compiled programs are shared, and little optimised: all are small."""
        flags = "--xla_backend_optimization_level=0"
        if metadata.version("jaxlib").startswith("0.10."):
            flags += " --xla_cpu_use_fusion_emitters=false"  # as in conftest.py
        more = dict(setting.split("=", 1) for setting in command.environment)
        flags = f"{flags} {more.pop('XLA_FLAGS', '')}"
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return (
            kept
            | more
            | {
                "HOME": str(self.folder / "home"),
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "JAX_PLATFORMS": "cpu",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "XLA_FLAGS": flags,
            }
        )

    def _make_by_hand(self, path: str) -> None:
        """Makes a file that a reader has from elsewhere."""
        target = self.root / path
        if path not in _BY_HAND:
            return
        with self._alone(Path(path).name):
            if target.exists():
                return
            if path in ("val_ids.csv", "test_ids.csv"):  # the split of `shards`, as released lists would give it
                subjects = np.unique(self._index(path.removesuffix("_ids.csv"))["subject_id"])
                target.write_text("".join(f"{subject}\n" for subject in subjects))
            elif path == "mimic3.json":
                self._convert_normalizer()
            elif path == "resnet34.pth":
                self._write_backbone(target)
            elif path == "notes.py":
                target.write_text(self.python_block("docs/encoders.md", '"""notes.py'))
                stay_id = self._index("train")["stay_id"][::2]
                vector = np.random.default_rng(0).normal(size=(len(stay_id), 5)).astype(np.float32)
                np.savez(self.root / "notes.npz", stay_id=stay_id, vector=vector)
            elif path == "listed.py":
                block = self.python_block("docs/sweeps.md", "def sweep(add)")
                target.write_text(f"{(self.root / 'configs' / 'pheno.py').read_text()}\n\n{block}")
            elif path == "moved/shards":
                shutil.copytree(self.root / "shards", target)
            else:
                table = {p.name: {"id": p.ccs, "codes": []} for p in schema.PHENOTYPES}
                table["Essential hypertension"]["codes"] = ["4019", "I10"]
                target.write_text(yaml.safe_dump(table))

    def python_block(self, document: str, begins: str) -> str:
        """A document's Python block with this beginning."""
        blocks = re.findall(r"```python\n(.*?)```", (self.root / document).read_text(), re.S)
        (found,) = [block for block in blocks if block.startswith(begins)]
        return found

    def run_block(self, block: str, *arguments: str) -> str:
        """Runs a Python block in the workspace; returns what it prints."""
        command = [sys.executable, "-c", block, *arguments]
        environment = self._environment(self.commands[0])
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _index(self, split: str) -> dict[str, np.ndarray]:
        return records.index(str(self.root / "shards"), "pheno", split)

    def _convert_normalizer(self) -> None:
        """By the document's own block, from a pickle of the released form."""
        with (self.root / "normalizer.pickle").open("wb") as file:
            pickle.dump({"means": np.arange(76.0), "stds": np.ones(76)}, file)
        self.run_block(self.python_block("docs/weights.md", "import json, pickle, sys"), "normalizer.pickle")

    def _write_backbone(self, target: Path) -> None:
        """A ResNet as torchvision names it: that of an exported run, with a head of its own."""
        import torch

        whole = torch.load(self.root / "best_checkpoint.pth.tar", weights_only=True)
        whole, prefix = whole.get("state_dict", whole), "cxr_model.vision_backbone."
        backbone = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
        width = next(value for name, value in backbone.items() if name.startswith("layer4")).shape[0]
        torch.save(backbone | {"fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}, target)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def methods_run(commands: list[Command]) -> set[str]:
    """The methods that some main command trains."""
    named = {c.value("config.method") for c in commands if c.module == "medfuse_jax.main"}
    return named & set(registry.METHODS)
