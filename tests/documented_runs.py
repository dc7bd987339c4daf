"""Run documented commands in a copy of the repository, as a reader would type them, at the smallest sizes.

`as_run` fills in placeholders and adds flags for size. `Workspace.done` first runs the documented commands whose output
a command reads. Each command runs once for all test processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import documented
import numpy as np
import xla_flags
import yaml
from documented import Command

from medfuse_jax import records, schema
from medfuse_jax.models import registry

_STAYS = 200
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
_PLACEHOLDERS = {
    "--mimic_iv=DIR": "--mimic_iv=raw/mimic-iv",
    "--mimic_cxr=DIR": "--mimic_cxr=raw/mimic-cxr",
    "--config.data.dir=DIR": "--config.data.dir=shards",
    "--config.model.modalities=FILE": "--config.model.modalities=notes.py",
    "--workdir=DIR": "--workdir=runs/pheno",
    "--data_dir=NEW": "--data_dir=moved/shards",
    "--data_dir=demo_hourly": "--data_dir=hourly",
    "--runner=...": "--runner=DirectRunner",
}
_OUT = {"data_prep.build": "shards", "data_prep.images.beam": "images", "data_prep.bench": "benchmark"}
# The quickest case of each benchmark preset, as a pattern for --only.
SMALLEST = {
    "cpu": "step uni_ehr",
    "dispatch": "dispatch pmap",
    "gpu": "lstm cudnn",
    "growth": "uni_ehr B=16 4 h",
    "hourly": "hourly uni_ehr",
    "devices": "2 devices$",
    "sweeps": "sweep early",
}
# Methods whose costs are counted: the others' take 15 s each.
COUNTED = ("uni_ehr", "medfuse")
# Commands that pages describe in words, or whose output they take as given.
_IN_WORDS = f"""
README.md: data_prep.synthetic --out=raw --stays={_STAYS}
README.md: data_prep.build --mimic_iv=DIR --out=ehr_alone
README.md: medfuse_jax.main --config=configs/pheno.py --config.method=uni_ehr --config.data.dir=ehr_alone --workdir=runs/ehr_alone
README.md: medfuse_jax.main --config=configs/pheno.py --config.method=uni_ehr --config.data.dir=DIR --workdir=runs/moved
docs/data.md: data_prep.build --mimic_iv=DIR --mimic_cxr=DIR --out=strict --profile=strict --seed=1 --workers=1
docs/data.md: medfuse_jax.evaluate --workdir=DIR --split=val --drop_ehr=0.5
docs/performance.md: medfuse_jax.main --config=configs/pheno.py --config.method=uni_ehr --config.data.dir=DIR --config.placement=device --config.parallel=shard_map --workdir=runs/mesh
docs/sweeps.md: medfuse_jax.main --config=sweeps/pheno/best_config.py --workdir=runs/best
docs/sweeps.md: medfuse_jax.sweep --config=listed.py --config.data.dir=DIR --workdir=sweeps/listed
docs/weights.md: medfuse_jax.torch_import --workdir=runs/uni_ehr --export=uni_ehr.safetensors
docs/weights.md: medfuse_jax.torch_import --workdir=runs/uni_cxr --export=uni_cxr.safetensors
docs/weights.md: medfuse_jax.torch_import --checkpoint=uni_ehr.safetensors --config=configs/pheno.py --config.method=uni_ehr --config.data.dir=DIR --workdir=runs/released_ehr
docs/weights.md: medfuse_jax.torch_import --checkpoint=uni_cxr.safetensors --config=configs/pheno.py --config.method=uni_cxr --config.data.dir=DIR --workdir=runs/released_cxr
"""  # noqa: E501
# Files that a reader has from elsewhere and `Workspace._provide` writes -> what they are made from.
_PROVIDED = {
    "val_ids.csv": "shards",
    "test_ids.csv": "shards",
    "notes.py": "shards",
    "features.npz": "shards",
    "moved/shards": "shards",
    "resnet34.pth": "best_checkpoint.pth.tar",
    "mimic3.json": "",
    "listed.py": "",
    "icd_9_10_definitions_2.yaml": "",
}


def all_commands() -> list[Command]:
    """Return the commands to run, each once: those of pages and configs, and those that pages describe in words."""
    shown = [c for c in documented.commands() if c.where.endswith(".md") or c.where.startswith("configs/")]
    for line in _IN_WORDS.strip().splitlines():
        where, module, *flags = shlex.split(line)
        shown.append(Command(where.rstrip(":"), module, tuple(flags)))
    found = {}
    for command in map(as_run, shown):
        # Every case of a preset runs as its quickest one, and the learning rate does not change what is run.
        flags = frozenset(flag for flag in command.flags if not flag.startswith("--config.learning_rate="))
        found.setdefault(command.value("preset") or (command.module, flags), command)
    return list(found.values())


def first_of_each_kind(commands: list[Command]) -> set[Command]:
    """Return the commands that the README shows, and of the others the first of each module and page's config.

    Those left differ from one of these in values that other tests cover, such as the method.
    """
    kinds, shown = {}, [as_run(command) for command in documented.commands() if command.where == "README.md"]
    for command in commands:
        if not command.value("config") or command.value("config").startswith("configs/"):
            kinds.setdefault((command.module, command.value("config")), command)
    return {*kinds.values(), *(command for command in commands if command in shown)}


def as_run(command: Command) -> Command:
    """Return the command with placeholders filled in and flags for size."""
    filled = _PLACEHOLDERS | {"--out=DIR": f"--out={_OUT.get(command.module)}"}
    if command.value("data_dir"):
        filled["--workdir=DIR"] = "--workdir=runs/moved"
    command = dataclasses.replace(command, flags=tuple(filled.get(flag, flag) for flag in command.flags))
    more = {
        "medfuse_jax.main": _for_main,
        "medfuse_jax.sweep": _for_sweep,
        "medfuse_jax.torch_import": lambda command: _SIZES if command.value("config") else (),
        "medfuse_jax.bench": _for_bench,
        "medfuse_jax.bench.compiled": _for_compiled,
        "medfuse_jax.bench.flops": lambda command: [f"--methods={','.join(COUNTED)}"],
        "medfuse_jax.paper": _for_paper,
        "data_prep.bench": lambda command: ("--copies=8", "--repeats=1"),
    }.get(command.module, lambda command: ())
    return dataclasses.replace(command, flags=(*command.flags, *more(command)))


def _for_main(command: Command) -> list[str]:
    config = command.value("config")
    if not config.startswith("configs/"):
        return []  # a sweep's best config has the sizes
    flags = list(_SIZES)
    if config == "configs/demo.py":
        flags.append(f"--config.data.synthetic_stays={_STAYS}")
        flags += [f"--config.pretrain.{name}.num_epochs=1" for name in ("ehr", "cxr")]
    elif config == "configs/length_of_stay.py":
        flags.append("--config.encoders=random")  # decompensation runs the stages
    elif not command.value("config.data.dir"):
        flags.append("--config.data.dir=shards")
    if command.where == "docs/methods.md" and config != "configs/demo.py":
        unnamed = ("--config=", "--config.learning_rate=")
        values = [flag.partition("=")[2] for flag in command.flags if not flag.startswith(unnamed)]
        named = [value for value in values if value not in ("true", "false")] or [Path(config).stem]
        flags.append(f"--workdir=runs/{'_'.join(named)}")
        flags += _given_encoders(command)
    if command.value("config.profile_steps"):
        flags.append("--config.num_epochs=3")  # enough steps for the documented ones
    return flags


def _given_encoders(command: Command) -> list[str]:
    """Let the rows that differ in method alone start from the README's pre-training, which other rows repeat."""
    method = command.value("config.method")
    own = ("--config.pretrain.", "--config.encoders=", "--config.init.")
    if not method or len(registry.METHODS[method].encoders) < 2 or any(flag.startswith(own) for flag in command.flags):
        return []
    return [f"--config.init.{name}=runs/pheno/pretrain_{name}" for name in ("ehr", "cxr")]


def _for_sweep(command: Command) -> list[str]:
    if command.value("workdir") == "sweeps/pheno":
        return list(_SIZES)  # the README's sweep runs all ten trials, and measures the lanes
    if command.value("folds"):
        return [*_SIZES, "--config.method=uni_ehr", "--trials=1", "--lanes=1", "--seeds=1", "--folds=2"]
    # One lane: measuring compiles a program for each number of lanes.
    return [*_SIZES, "--trials=3", "--lanes=1", *(["--round=2"] if command.value("round") else [])]


def _for_paper(command: Command) -> list[str]:
    methods = "medfuse" if command.value("preset") else "lstm"
    return ["--tasks=mortality", f"--methods={methods}", "--trials=1", "--epochs=1"]


def _for_bench(command: Command) -> list[str]:
    preset = command.value("preset")
    sizes = ["--repeats=1", *(["--warm_up=0", "--trials=3"] if preset == "sweeps" else [])]
    sizes += ["--tiny"] if preset in ("devices", "gpu", "hourly", "sweeps") else []
    return [f"--only={SMALLEST[preset]}", *sizes, f"--json=bench_{preset}.json"]


def _for_compiled(command: Command) -> list[str]:
    sizes = ["--rows=2", "--images=1", "--time_steps=4"] if command.value("rows") else ["--case=lstm"]
    return ["--target=cpu", "--quick", *sizes, "--json=compiled.json"]


_WEIGHTS = (".safetensors", ".pth.tar")
# A folder from which Python starts as if torch, an optional package, were not installed: tensorboardX imports it where
# it is, which takes 3 s of each run.
_WITHOUT_TORCH = "without_torch"
# Hidden from the search. A None in sys.modules would do for imports, but scipy looks there for the module's classes.
_HIDE_TORCH = """from importlib.machinery import PathFinder

_find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *others: None if name == "torch" else _find(name, *others)
"""


def reads(command: Command) -> list[str]:
    """Return the paths among a command's flags that it reads."""
    names = ["mimic_iv", "mimic_cxr", "val_ids", "test_ids", "phenotypes", "checkpoint", "data_dir"]
    names += ["cxr_features", "config.data.cxr_features"]
    names += {
        "medfuse_jax.attribution": ["workdir"],
        "medfuse_jax.compare": ["a", "b"],
        "medfuse_jax.paper": ["data"],
        "medfuse_jax.predict": ["workdir", "data"],
    }.get(command.module, [])
    names += ["config.data.dir", "config.init.ehr", "config.init.cxr", "config.init.model"]
    if command.module == "medfuse_jax.evaluate" or command.value("export").endswith(_WEIGHTS):
        names.append("workdir")
    found = [command.value(name) for name in names]
    found += [path.partition(":")[0] for path in command.value("runs").split(",")]
    found += [command.value("config")] if not command.value("config").startswith("configs/") else []
    found += [command.value(name) for name in ("config.data.statistics", "config.model.modalities")]
    return ["runs/pheno" if path == "runs" else path for path in found if path not in ("", "static", "train")]


def writes(command: Command) -> list[str]:
    """Return the paths among a command's flags that it writes."""
    export = command.value("export")
    if export.endswith(_WEIGHTS):
        return [export]
    only_reads = command.module in ("medfuse_jax.evaluate", "medfuse_jax.predict")
    names = ["out"] if only_reads else ["out", "workdir"]
    return [command.value(name) for name in names if command.value(name)]


def _is_in(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def needs(command: Command, commands: list[Command]) -> list[Command]:
    """Return the commands to run first: those that write what this one reads, or, earlier, to the same paths."""
    read = [_PROVIDED.get(path, path) for path in reads(command) if not _is_in(path, writes(command))]
    before = commands[: commands.index(command)]
    makers = [c for c in commands if any(_is_in(path, writes(c)) for path in read)]
    makers += [c for c in before if set(writes(c)) & set(writes(command)) and not _are_together(c, command)]
    return [c for c in dict.fromkeys(makers) if c != command]


def missing(command: Command, commands: list[Command]) -> list[str]:
    """Return the paths that a command reads and no command writes."""
    written = [path for c in commands for path in writes(c)]
    return [path for path in reads(command) if path not in _PROVIDED and not _is_in(path, written)]


def _are_together(a: Command, b: Command) -> bool:
    """Return whether two commands are processes of one command."""
    of_all = [tuple(flag for flag in c.flags if not flag.startswith("--process=")) for c in (a, b)]
    return of_all[0] == of_all[1] and bool(a.value("process"))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended. output: stdout and stderr together."""

    returncode: int
    output: str


class Workspace:
    """A copy of the repository in `folder`, in which commands run."""

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
        """Copy what commands read. Numbers in tables that commands write become 0, to show that they are written."""
        for name in ("medfuse_jax", "data_prep", "configs", "docs", "jobs", "results"):
            shutil.copytree(documented.ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in documented.ROOT.glob("*.md"):
            if path.name != "BENCHMARKS.md":
                shutil.copy(path, target)
        generated = re.compile(r"(<!-- made by [^>]* -->\n)(.*?<!-- end -->)", re.S)
        number = re.compile(r"(?<!\w)[\d,.]*\d(?!\w)")  # not those in names
        for name in ("methods.md", "performance.md"):
            page = target / "docs" / name
            blanked, count = generated.subn(lambda found: found[1] + number.sub("0", found[2]), page.read_text())
            assert count == 1, name
            page.write_text(blanked)
        (target / _WITHOUT_TORCH).mkdir()
        (target / _WITHOUT_TORCH / "sitecustomize.py").write_text(_HIDE_TORCH)

    @property
    def root(self) -> Path:
        return self.folder / "repository"

    def done(self, command: Command) -> Outcome:
        """Run a command once, after those it needs; return how it ended."""
        together = [c for c in self.commands if c == command or _are_together(c, command)]
        key = hashlib.sha256(str(together[0]).encode()).hexdigest()[:16]
        with self._alone(key):
            path = self.folder / f"{key}.json"
            if not path.exists():
                for need in dict.fromkeys(need for c in together for need in needs(c, self.commands)):
                    outcome = self.done(need)
                    assert outcome.returncode == 0, f"needed first: {need}\n{outcome.output[-3000:]}"
                for part in reads(command):
                    self._provide(part)
                outcomes = {str(c): dataclasses.asdict(o) for c, o in zip(together, self._run(together))}
                path.write_text(json.dumps(outcomes))
            return Outcome(**json.loads(path.read_text())[str(command)])

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold a lock against other test processes."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _run(self, together: list[Command]) -> list[Outcome]:
        port, running = _free_port(), []
        for command in together:
            flags = [re.sub(r"HOST:\d+$", f"localhost:{port}", flag) for flag in command.flags]
            if "--stay=STAY_ID" in flags:
                flags[flags.index("--stay=STAY_ID")] = f"--stay={self._index('test')['stay_id'][0]}"
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
        return [Outcome(process.returncode, output) for process, output in zip(running, outputs)]

    def _environment(self, command: Command) -> dict[str, str]:
        """Return a reader's environment, without simulated devices. All commands share a compilation cache."""
        more = dict(setting.split("=", 1) for setting in command.environment)
        if command.module in ("medfuse_jax.main", "medfuse_jax.sweep"):
            more["PYTHONPATH"] = str(self.root / _WITHOUT_TORCH)
        flags = f"{xla_flags.QUICK} {more.pop('XLA_FLAGS', '')}"
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

    def _provide(self, path: str) -> None:
        """Write a file that a reader has from elsewhere."""
        target = self.root / path
        if path not in _PROVIDED:
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
            elif path == "features.npz":
                self.run_block(self.python_block("docs/encoders.md", '"""embed.py'), "shards", path)
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
        """Return the Python block of a document that begins with the given text."""
        blocks = re.findall(r"```python\n(.*?)```", (self.root / document).read_text(), re.S)
        (found,) = [block for block in blocks if block.startswith(begins)]
        return found

    def run_block(self, block: str, *arguments: str) -> str:
        """Run a Python block in the workspace and return its output."""
        command = [sys.executable, "-c", block, *arguments]
        environment = self._environment(self.commands[0])
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _index(self, split: str) -> dict[str, np.ndarray]:
        return records.index(str(self.root / "shards"), "pheno", split)

    def _convert_normalizer(self) -> None:
        """Convert a pickle like the released one, with the page's own code."""
        with (self.root / "normalizer.pickle").open("wb") as file:
            pickle.dump({"means": np.arange(76.0), "stds": np.ones(76)}, file)
        self.run_block(self.python_block("docs/weights.md", "import json, pickle, sys"), "normalizer.pickle")

    def _write_backbone(self, target: Path) -> None:
        """Write an exported run's ResNet under torchvision's names, with a head."""
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
