"""The commands that README, docs/, BENCHMARKS.md, the configs and the job files show, and how a reader would run them.

A command is parsed by test_docs.py and run by test_documented_commands.py.
"""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

from medfuse_jax.bench import flops
from medfuse_jax.models import registry

ROOT = Path(__file__).parent.parent
_QUOTED = r"'[^']*'" + r'|"[^"]*"'
_FLAG = rf"(?:{_QUOTED}|--?[\w.]+(?:=(?:{_QUOTED}|[^\s`'\"])*)?)"
_COMMAND = re.compile(
    rf"((?:\b[A-Z][A-Z_]*=[^\s`]+ +)*)python -m ((?:medfuse_jax|data_prep)[\w.]*)((?: +{_FLAG})*)(.{{0,3}})"
)
_UNREAD = re.compile(r" ?['\"]| --?\w| \\")  # a flag that the pattern above stopped before


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as a document shows it.

    where: the document, relative to the repository; flags: '--name=value', unquoted; environment: 'NAME=value' before.
    """

    where: str
    module: str
    flags: tuple[str, ...]
    environment: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.where}: {self.module}", *self.flags])

    def value(self, name: str, default: str = "") -> str:
        """The value of the last --name=value, as absl takes it."""
        values = [flag.partition("=")[2] for flag in self.flags if flag.partition("=")[0] == f"--{name}"]
        return values[-1] if values else default


def texts() -> dict[str, str]:
    """Document -> its text, of a Python file its docstring."""
    found = {str(p.relative_to(ROOT)): p.read_text() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    for path in (p for folder in ("medfuse_jax", "data_prep", "configs") for p in (ROOT / folder).rglob("*.py")):
        found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return found | _jobs()


def _jobs() -> dict[str, str]:
    """The job files, each with its command on one line and with the options that the file's comment gives it."""
    slurm, gke = ((ROOT / "jobs" / name).read_text() for name in ("slurm.sh", "gke_tpu.yaml"))
    options = re.search(r"^#\s+sbatch jobs/slurm.sh (.*)", slurm, re.M)[1]
    return {"jobs/slurm.sh": slurm.replace('"$@"', options), "jobs/gke_tpu.yaml": re.sub(r"\n\s+- ", " ", gke)}


def commands() -> list[Command]:
    """Every command that is shown, the README's first; --config.method=NAME stands for one command a method."""
    found = []
    order = sorted(texts().items(), key=lambda item: (not item[0].startswith("README"), item[0]))
    for where, text in order:
        text = re.sub(r" *(?:\\\n\s*|\n\s*(?=--))", " ", text)  # a command that goes on in the next line
        for environment, module, flags, after in _COMMAND.findall(text):
            if _UNREAD.match(after):
                raise ValueError(f"{where}: cannot read what follows {module}{flags}: {after!r}")
            named = [flags.replace("=NAME", f"={name}") for name in registry.METHODS] if "=NAME" in flags else [flags]
            found += [Command(where, module, tuple(shlex.split(one)), tuple(environment.split())) for one in named]
    return list(dict.fromkeys(found))


def made_table(page: str) -> dict[str, list[str]]:
    """The table of docs/methods.md that `medfuse_jax.bench.flops` makes: method -> its further cells."""
    rows = page.partition(flops._BEGIN)[2].partition(flops._END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}
