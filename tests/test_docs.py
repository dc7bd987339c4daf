"""Every command in the README, the docs, the job files or a docstring is one that exists, flags and values included."""

import ast
import functools
import re
import runpy
from pathlib import Path

import pytest
import yaml

from medfuse_jax import config as config_lib

_ROOT = Path(__file__).parent.parent
_COMMAND = re.compile(r"python -m ((?:medfuse_jax|data_prep)[\w.]*)((?:[ ]+--?[\w.]+(?:=[^\s`]*)?)*)")


def _texts() -> dict[str, str]:
    texts = {str(p.relative_to(_ROOT)): p.read_text() for p in [*_ROOT.glob("*.md"), *_ROOT.glob("docs/*.md")]}
    for path in (p for folder in ("medfuse_jax", "data_prep", "configs") for p in (_ROOT / folder).rglob("*.py")):
        texts[str(path.relative_to(_ROOT))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return texts | _jobs()


def _jobs() -> dict[str, str]:
    """The job files, each with its command on one line and with the options that the file's comment gives it."""
    slurm, gke = ((_ROOT / "jobs" / name).read_text() for name in ("slurm.sh", "gke_tpu.yaml"))
    options = re.search(r"^#\s+sbatch jobs/slurm.sh (.*)", slurm, re.M)[1]
    return {"jobs/slurm.sh": slurm.replace('"$@"', options), "jobs/gke_tpu.yaml": re.sub(r"\n\s+- ", " ", gke)}


def _commands() -> list[tuple[str, str, str]]:
    found = []
    for where, text in _texts().items():
        text = re.sub(r"\\?\n\s+(?=--)", " ", text)  # a command that goes on in the next line
        found += [(where, module, flags) for module, flags in _COMMAND.findall(text)]
    return sorted(set(found))


def _source(module: str) -> Path:
    path = _ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _check(module: str, flags: str) -> None:
    source = _source(module)
    assert source.exists(), f"no module {module}"
    text = source.read_text()
    assert "__main__" in text, f"{module} is no command"
    defined = set(re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", text)) | {"help"}
    given = [flag.lstrip("-").partition("=") for flag in flags.split()]
    for name, _, _ in given:
        assert name.split(".")[0] in defined, f"{module} has no flag --{name}"
    values = {name: value for name, _, value in given}
    if "config" in values and not values["config"].isupper():
        config = runpy.run_path(str(_ROOT / values["config"]))["get_config"]()
        for name, _, value in given:
            # What is written in capitals stands for the user's own.
            if name.startswith("config."):
                field = functools.reduce(lambda node, part: node[part], name.split(".")[1:], config)
                read = str if isinstance(field, str) else yaml.safe_load  # as the flag does: '20:25' is no number
                wanted = "" if value.rstrip("…./").isupper() else read(value)
                config.update_from_flattened_dict({name.removeprefix("config."): wanted})
        config_lib.validate(config)


@pytest.mark.parametrize(("where", "module", "flags"), _commands(), ids=lambda value: str(value)[:60])
def test_a_command_that_is_shown_exists(where, module, flags):
    _check(module, flags)


def test_the_search_finds_the_commands_of_the_readme_and_the_job_files():
    found = {(where, module) for where, module, _ in _commands()}
    wanted = {"medfuse_jax.main", "medfuse_jax.evaluate", "medfuse_jax.sweep", "data_prep.build"}
    assert {("README.md", module) for module in wanted} <= found and len(found) > 15
    flags_of = {where: flags for where, _, flags in _commands() if where.startswith("jobs/")}
    assert set(flags_of) == {f"jobs/{path.name}" for path in (_ROOT / "jobs").iterdir()}
    for flags in flags_of.values():
        assert all(name in flags for name in (" --distributed", " --config=", " --config.data.dir=", " --workdir="))


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("medfuse_jax.mian", ""),
        ("medfuse_jax.plan", ""),
        ("medfuse_jax.main", " --config=configs/pheno.py --work=DIR"),
        ("medfuse_jax.main", " --config=configs/phenotypes.py"),
        ("medfuse_jax.main", " --config=configs/pheno.py --config.learning_rat=1.0"),
        ("medfuse_jax.main", " --config=configs/pheno.py --config.method=medfuze"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(module, flags):
    with pytest.raises((AssertionError, FileNotFoundError, ValueError, KeyError)):
        _check(module, flags)
