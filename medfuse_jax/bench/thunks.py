"""Count what a GPU program launches, from the list of steps (XLA: thunks) that its runtime goes through.

XLA joins kernels to CUDA graphs after it has written the program (`Compiled.as_text()`), so only this list, which XLA
writes to a folder on request, shows them. A graph is one launch, whatever is in it.
"""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

_GRAPH, _LOOP = "kCommandBuffer", "kWhile"
_GROUPS = (_GRAPH, _LOOP, "kSequential", "kConditional")


@dataclasses.dataclass
class Thunk:
    """One step of the runtime: a launch, or a group of steps. is_condition: of the loop that it is in."""

    kind: str
    indent: int
    is_condition: bool
    inside: list["Thunk"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Launches:
    """Launches of one call of a program, those outside its loops, its graphs, and the kernels in them."""

    total: int
    outside_loops: int
    graphs: int
    in_graphs: int


def compile_with_thunks(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, list[Thunk]]:
    """Compile a program for a GPU; return it and its thunks."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        # XLA writes the list once more if its passes changed it, under a longer name.
        path = max(Path(folder).glob("*thunk_sequence*.txt"), key=lambda path: len(path.name))
        return compiled, parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> list[Thunk]:
    """Return the thunks of a list, with those inside a graph or loop, which are indented."""
    top = Thunk("kSequential", -1, is_condition=False)
    groups, is_condition = [top], False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            is_condition = line.strip() == "condition:"
        elif found := re.match(r"( *)\d+: (k\w+)", line):
            indent, kind = len(found[1]), found[2]
            while groups[-1].indent >= indent:
                groups.pop()
            thunk = Thunk(kind, indent, is_condition and groups[-1].kind == _LOOP)
            groups[-1].inside.append(thunk)
            if kind in _GROUPS:
                groups.append(thunk)
    return top.inside


def count(thunks: list[Thunk], trips: list[int]) -> Launches:
    """Count the launches. trips: of each loop, those in graphs too, in the order of the program.

    A loop outside a graph also launches its condition, once a trip.
    """
    remaining = iter(trips)
    total = outside = 0
    for thunk in thunks:
        n = _launched(thunk, remaining)
        total += n
        outside += 0 if thunk.kind == _LOOP else n
    if next(remaining, None) is not None:
        raise ValueError("the program has more loops than its thunks")
    graphs = [thunk for thunk in _all(thunks) if thunk.kind == _GRAPH]
    in_graphs = sum(inner.kind not in _GROUPS for graph in graphs for inner in _all(graph.inside))
    return Launches(total, outside, len(graphs), in_graphs)


def _launched(thunk: Thunk, trips: Iterator[int]) -> int:
    times = next(trips) if thunk.kind == _LOOP else 1
    inside = times * sum(_launched(inner, trips) for inner in thunk.inside)
    return inside if thunk.kind in _GROUPS and thunk.kind != _GRAPH else 1


def _all(thunks: list[Thunk]) -> Iterator[Thunk]:
    for thunk in thunks:
        yield thunk
        yield from _all(thunk.inside)
