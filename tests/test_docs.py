"""Every command in the README, the docs, the job files or a docstring is one that exists, flags and values included."""

import functools
import re
import runpy
from pathlib import Path

import documented
import pytest
import yaml

from medfuse_jax import config as config_lib


def _source(module: str) -> Path:
    path = documented.ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _check(module: str, flags: tuple[str, ...]) -> None:
    source = _source(module)
    assert source.exists(), f"no module {module}"
    text = source.read_text()
    assert "__main__" in text, f"{module} is no command"
    defined = set(re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", text)) | {"help"}
    given = [flag.lstrip("-").partition("=") for flag in flags]
    for name, _, _ in given:
        assert name.split(".")[0] in defined, f"{module} has no flag --{name}"
    values = {name: value for name, _, value in given}
    if "config" in values and not values["config"].isupper():
        config = runpy.run_path(str(documented.ROOT / values["config"]))["get_config"]()
        for name, _, value in given:
            # What is written in capitals stands for the user's own.
            if name.startswith("config."):
                field = functools.reduce(lambda node, part: node[part], name.split(".")[1:], config)
                read = str if isinstance(field, str) else yaml.safe_load  # as the flag does: '20:25' is no number
                wanted = "" if value.rstrip("…./").isupper() else read(value)
                config.update_from_flattened_dict({name.removeprefix("config."): wanted})
        config_lib.validate(config)


@pytest.mark.parametrize("command", documented.commands(), ids=lambda command: str(command)[:70])
def test_a_command_that_is_shown_exists(command):
    _check(command.module, command.flags)


def test_the_search_finds_the_commands_of_the_readme_and_the_job_files():
    found = {(command.where, command.module) for command in documented.commands()}
    wanted = {"medfuse_jax.main", "medfuse_jax.evaluate", "medfuse_jax.sweep", "data_prep.build"}
    assert {("README.md", module) for module in wanted} <= found and len(found) > 15
    of_jobs = {command.where: command for command in documented.commands() if command.where.startswith("jobs/")}
    assert set(of_jobs) == {f"jobs/{path.name}" for path in (documented.ROOT / "jobs").iterdir()}
    for command in of_jobs.values():
        assert "--distributed" in command.flags
        assert all(command.value(name) for name in ("config", "config.data.dir", "workdir"))


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("medfuse_jax.mian", ()),
        ("medfuse_jax.data.plan", ()),
        ("medfuse_jax.main", ("--config=configs/pheno.py", "--work=DIR")),
        ("medfuse_jax.main", ("--config=configs/phenotypes.py",)),
        ("medfuse_jax.main", ("--config=configs/pheno.py", "--config.learning_rat=1.0")),
        ("medfuse_jax.main", ("--config=configs/pheno.py", "--config.method=medfuze")),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(module, flags):
    with pytest.raises((AssertionError, FileNotFoundError, ValueError, KeyError)):
        _check(module, flags)
