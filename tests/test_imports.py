"""The rooms of the house: which module may import which (docs/design.md, "One way for the data")."""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
# Definitions, and the look of a page.
_SHARED = {"medfuse_jax", *(f"medfuse_jax.{name}" for name in ("tasks", "records", "errors", "files", "webpage"))}


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


@pytest.mark.parametrize("module", ["medfuse_jax.report.__main__", "medfuse_jax.webpage", "data_prep.build"])
def test_reports_and_data_prep_run_without_jax(module):
    assert not {name for name in _reaches(module) if name.split(".")[0] in ("jax", "flax", "optax", "orbax")}
