"""Documented commands exist, with their flags and values; links lead to files; the layout lists every module."""

import functools
import re
import runpy
from pathlib import Path

import documented
import yaml
from documented import ROOT, Command

from medfuse_jax import config as config_lib


def _problem(command: Command) -> str:
    """Return what is wrong with a command, or ''."""
    path = ROOT / command.module.replace(".", "/")
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists() or "__main__" not in source.read_text():
        return f"{command.module} is not a command"
    text = source.read_text()
    if "define_process_flags()" in text:
        text += (ROOT / "medfuse_jax/runtime/command_line.py").read_text()
    defined = {"help", *re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", text)}
    unknown = [name for name, _ in _options(command) if name.split(".")[0] not in defined]
    if unknown:
        return f"{command.module} has no flag --{unknown[0]}"
    try:
        _check_config(command)
    except (FileNotFoundError, ValueError, KeyError, AttributeError) as error:
        return str(error) or repr(error)
    return ""


def _options(command: Command) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (flag.lstrip("-").partition("=") for flag in command.flags)]


def _check_config(command: Command) -> None:
    """Validate the config with its overrides; upper-case values are placeholders."""
    file = command.value("config")
    if not file or file.isupper():
        return
    config = _get_config(ROOT / file)()
    for name, value in _options(command):
        if name.startswith("config."):
            field = functools.reduce(lambda node, part: node[part], name.split(".")[1:], config)
            read = str if isinstance(field, str) else yaml.safe_load  # as the flag does: '20:25' stays a string
            wanted = "" if value.rstrip("…./").isupper() else read(value)
            config.update_from_flattened_dict({name.removeprefix("config."): wanted})
    config_lib.validate(config)


@functools.cache
def _get_config(path: Path):
    return runpy.run_path(str(path))["get_config"]


def test_documented_commands_exist():
    problems = {str(command): _problem(command) for command in documented.commands()}
    assert {command: problem for command, problem in problems.items() if problem} == {}


def test_wrong_commands_are_found():
    for module, *flags in [
        ("medfuse_jax.mian",),
        ("medfuse_jax.data.plan",),
        ("medfuse_jax.main", "--config=configs/pheno.py", "--work=DIR"),
        ("medfuse_jax.main", "--config=configs/phenotypes.py"),
        ("medfuse_jax.main", "--config=configs/pheno.py", "--config.learning_rat=1.0"),
        ("medfuse_jax.main", "--config=configs/pheno.py", "--config.method=medfuze"),
    ]:
        assert _problem(Command("README.md", module, tuple(flags))), (module, flags)


def test_readme_and_job_commands_are_found():
    found = {(command.where, command.module) for command in documented.commands()}
    wanted = {"medfuse_jax.main", "medfuse_jax.evaluate", "medfuse_jax.sweep", "data_prep.build"}
    assert {("README.md", module) for module in wanted} <= found
    jobs = {command.where: command for command in documented.commands() if command.where.startswith("jobs/")}
    assert set(jobs) == {f"jobs/{path.name}" for path in (ROOT / "jobs").iterdir()}
    for command in jobs.values():
        assert command.module == "medfuse_jax.sweep"
        assert all(command.value(name) for name in ("config", "config.data.dir", "workdir"))


def test_readme_starts_with_the_demo_and_the_tests():
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 2 and "--config=configs/demo.py" in blocks[0]
    assert blocks[1].splitlines() == ["pip install '.[test]'", "python -m pytest -n 2"]  # .ci/run runs this block


def test_links_between_pages_lead_to_files():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]
    assert len(links) > 30
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_layout_in_design_md_lists_every_module():
    table = (ROOT / "docs" / "design.md").read_text().partition("## Layout")[2].partition("Reading order")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    shown = {cells[1].strip(" `/"): set(re.findall(r"`(\w+)`", cells[3])) for cells in rows}
    for folder, names in shown.items():
        modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}
        folders = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
        own_row = {other.rpartition("/")[2] for other in shown}
        assert names == modules | (folders - own_row), folder
