"""Find the commands shown in the pages, the configs, docstrings and job files.

test_docs.py checks them; test_documented_commands.py runs them.
"""

import ast
import dataclasses
import functools
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
_UNREAD = re.compile(r" ?['\"]| --?\w| \\")  # a flag that _COMMAND does not match


@dataclasses.dataclass(frozen=True)
class Command:
    """A command shown in a document.

    where: the document, relative to the repository; flags: '--name=value', unquoted; environment: 'NAME=value'.
    """

    where: str
    module: str
    flags: tuple[str, ...]
    environment: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.where}: {self.module}", *self.flags])

    def value(self, name: str, default: str = "") -> str:
        """Return the value of the last --name=value, the one that absl uses."""
        values = [flag.partition("=")[2] for flag in self.flags if flag.partition("=")[0] == f"--{name}"]
        return values[-1] if values else default


def texts() -> dict[str, str]:
    """Return document -> its text, or for a Python file its docstring."""
    found = {str(p.relative_to(ROOT)): p.read_text() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    for path in (p for folder in ("medfuse_jax", "data_prep", "configs") for p in (ROOT / folder).rglob("*.py")):
        found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return found | _jobs()


def _jobs() -> dict[str, str]:
    """Return the job files, each with its command on one line, and slurm.sh with the options from its usage comment."""
    slurm, gke = ((ROOT / "jobs" / name).read_text() for name in ("slurm.sh", "gke_tpu.yaml"))
    options = re.search(r"^#\s+sbatch jobs/slurm.sh (.*)", slurm, re.M)[1]
    return {"jobs/slurm.sh": slurm.replace('"$@"', options), "jobs/gke_tpu.yaml": re.sub(r"\n\s+- ", " ", gke)}


@functools.cache
def commands() -> list[Command]:
    """Return all commands, the README's first. --config.method=NAME expands to one command per method."""
    found = []
    order = sorted(texts().items(), key=lambda item: (not item[0].startswith("README"), item[0]))
    for where, text in order:
        text = re.sub(r" *(?:\\\n\s*|\n\s*(?=--))", " ", text)  # join continued lines
        for environment, module, flags, after in _COMMAND.findall(text):
            if _UNREAD.match(after):
                raise ValueError(f"{where}: cannot parse {after!r} after {module}{flags}")
            named = [flags.replace("=NAME", f"={name}") for name in registry.METHODS] if "=NAME" in flags else [flags]
            found += [Command(where, module, tuple(shlex.split(one)), tuple(environment.split())) for one in named]
    return list(dict.fromkeys(found))


def made_table(page: str) -> dict[str, list[str]]:
    """Return the table in docs/methods.md that `medfuse_jax.bench.flops` writes: method -> its other cells."""
    rows = page.partition(flops.BEGIN)[2].partition(flops.END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}
