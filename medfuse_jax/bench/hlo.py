"""Count what a compiler made of a program: launches, memory traffic, copies, collectives, estimated cycles.

Reads the text of a compiled program (`Compiled.as_text()`), in which each instruction outside a fusion is one launch. A
loop's body counts once a trip. Where the number of trips depends on data, as in the recurrence, the caller gives it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Instructions that launch nothing: they name, group or wait.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
_FREE |= {"replica-id", "add-dependency", "while", "conditional", "call", "domain"}
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_BITS = re.compile(r"(?:pred|token|[a-z]+?(\d+)\w*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `%name = shape op(arguments), attributes`."""

    name: str
    shape: str
    op: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def launches(self) -> bool:
        return self.op not in _FREE and not self.op.endswith("-done")

    @property
    def kind(self) -> str:
        """The operation, whether it is asynchronous or not."""
        return self.op.removesuffix("-start")

    def attribute(self, name: str) -> str:
        """Return an attribute's value, such as the computation that `calls` names; '' if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the name of the one that runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def around(self) -> dict[str, dict[str, Instruction]]:
        """Return the computation of each instruction by name: names are unique in a program."""
        return {name: computation for computation in self.computations.values() for name in computation}


@dataclasses.dataclass
class Loop:
    """A loop.

    is_fixed: whether the program fixes the trips. launches: of one trip, inner loops included. depth: loops around it.
    """

    trips: int
    is_fixed: bool
    launches: int
    depth: int


def parse(text: str) -> Program:
    """Return the computations of a program's text."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line.rstrip()):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
            instruction = _instruction(found[1], found[2])
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest, len(op))
    return Instruction(name, shape, op, rest[len(op) + 1 : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Return where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def loops(program: Program, trips: int = 1) -> list[Loop]:
    """Return the loops of the program, inner ones after the loop that they are in. trips: where data decides them."""
    return list(_loops(program, program.entry, trips))


def _loops(program: Program, name: str, trips: int, depth: int = 0) -> Iterator[Loop]:
    for instruction in program.computations[name].values():
        if instruction.op == "while":
            body, times, is_fixed = _body(program, instruction, trips)
            launched = sum(n for _, n in executed(program, trips, body))
            yield Loop(times, is_fixed, launched, depth)
            yield from _loops(program, body, trips, depth + 1)
        elif instruction.op == "call" and not _is_graph(instruction):
            yield from _loops(program, instruction.attribute("to_apply"), trips, depth)


def executed(program: Program, trips: int = 1, name: str = "", in_graphs: bool = False) -> Iterator[tuple]:
    """Yield (instruction, how often it runs) for each launch.

    A CUDA graph is one launch, its `call`; in_graphs: yield what is inside it instead.
    """
    for instruction in program.computations[name or program.entry].values():
        if instruction.op == "while":
            body, times, _ = _body(program, instruction, trips)
            yield from ((inner, times * n) for inner, n in executed(program, trips, body, in_graphs))
        elif instruction.op == "call" and _is_graph(instruction) and not in_graphs:
            yield instruction, 1
        elif instruction.op == "call":
            yield from executed(program, trips, instruction.attribute("to_apply"), in_graphs)
        elif instruction.op == "conditional":
            branches = [list(executed(program, trips, branch, in_graphs)) for branch in _branches(instruction)]
            yield from max(branches, key=lambda branch: sum(n for _, n in branch), default=[])
        elif instruction.launches:
            yield instruction, 1


def _body(program: Program, loop: Instruction, trips: int) -> tuple[str, int, bool]:
    """Return a loop's body, its trips and whether the program fixes them."""
    fixed = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    number = int(fixed[1]) if fixed else _limit(program.computations[loop.attribute("condition")])
    return loop.attribute("body"), trips if number is None else number, number is not None


def _limit(condition: dict[str, Instruction]) -> int | None:
    """Return the constant below which a loop's counter stays, which begins at 0; None if it is no constant."""
    for compare in condition.values():
        if compare.op == "compare" and compare.attribute("direction") == "LT":
            limit = condition[compare.operands[1]]
            return int(limit.arguments) if limit.op == "constant" else None
    return None


def _is_graph(call: Instruction) -> bool:
    return "command_buffer" in call.attribute("to_apply")


def _branches(conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    either = re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", conditional.attributes)
    names = listed[1].split(",") if listed else either
    return [name.strip().lstrip("%") for name in names]


def num_bytes(shape: str) -> int:
    """Return the bytes of a shape's text, such as 'f32[16,256]{1,0}' or a tuple of such."""
    return sum(_item_bits(dtype) * math.prod(dims) for dtype, dims in arrays(shape)) // 8


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the type and dimensions of each array of a shape's text."""
    found = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


@functools.cache
def _item_bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8 * (dtype == "pred")
    return int(_BITS.match(dtype)[1])


def traffic(program: Program, trips: int = 1) -> float:
    """Return the bytes that all launches read and write.

    A launch reads its operands and writes its results. Of an operand that is only sliced it reads the slices, and of
    one that is updated in place it writes the update.
    """
    return sum(times * _launch_bytes(program, launch) for launch, times in executed(program, trips, in_graphs=True))


def _launch_bytes(program: Program, launch: Instruction) -> float:
    around = program.around[launch.name]
    shapes = [around[name].shape for name in launch.operands]
    if launch.op.endswith("-start"):
        return 2 * sum(map(num_bytes, shapes))
    inside = program.computations.get(launch.attribute("calls"))
    if launch.op != "fusion" or not inside:
        return _plain_bytes(launch, shapes)
    users = collections.defaultdict(list)
    for instruction in inside.values():
        for position, operand in enumerate(instruction.operands):
            users[operand].append((instruction, position))
    read = sum(_read_bytes(inside, users, x) for x in inside.values() if x.op == "parameter")
    updates = [x for x in inside.values() if x.op == "dynamic-update-slice"]
    saved = sum(num_bytes(x.shape) - num_bytes(inside[x.operands[1]].shape) for x in updates)
    return read + max(num_bytes(launch.shape) - saved, 0)


def _plain_bytes(launch: Instruction, shapes: list[str]) -> int:
    if launch.op in _SLICES:
        return 2 * num_bytes(launch.shape)
    if launch.op == "dynamic-update-slice":
        return 2 * num_bytes(shapes[1])
    return sum(map(num_bytes, shapes)) + num_bytes(launch.shape)


def _read_bytes(inside: dict[str, Instruction], users: dict, parameter: Instruction) -> int:
    """Return the bytes that a fusion reads of one of its parameters."""
    whole, read, waiting = num_bytes(parameter.shape), 0, [parameter.name]
    while waiting:
        for user, position in users[waiting.pop()]:
            if user.op in _SLICES and position == 0:
                read += num_bytes(user.shape)
            elif user.op == "bitcast":
                waiting.append(user.name)
            elif not (user.op == "dynamic-update-slice" and position == 0):
                return whole
    return min(read, whole)


def weight_copies(program: Program, shapes: set[tuple[int, ...]]) -> int:
    """Count the copies of float32 arrays that have the shape of a weight (and thus of its two Adam moments).

    A TPU's copies into its own fast memory, S(1), are how it reads, and are left out.
    """
    copies = [i for i, _ in executed(program, in_graphs=True) if i.kind == "copy" and "S(1)" not in i.shape]
    return sum(any(array == ("f32", dims) for array in arrays(i.shape)[:1] for dims in shapes) for i in copies)


def collectives(program: Program, trips: int = 1) -> tuple[int, int]:
    """Count the collectives, and those of them that send one number alone."""
    found = [(i, times) for i, times in executed(program, trips, in_graphs=True) if i.kind in COLLECTIVES]
    single = [(i, times) for i, times in found if _num_elements(program, i) == 1]
    return sum(n for _, n in found), sum(n for _, n in single)


def written_collectives(text: str) -> tuple[int, int]:
    """Count the same in a program as lowered, before its compiler joins some of them."""
    kinds = "|".join(kind.replace("-", "_") for kind in COLLECTIVES)
    sent = re.findall(rf'stablehlo\.(?:{kinds})"?.*?: \((tensor[^)]*)\) ->', text, re.DOTALL)
    return len(sent), sum(math.prod(int(n) for n in re.findall(r"(\d+)x", types)) == 1 for types in sent)


def _num_elements(program: Program, collective: Instruction) -> int:
    around = program.around[collective.name]
    return sum(math.prod(dims) for operand in collective.operands for _, dims in arrays(around[operand].shape))


def cycles(program: Program, trips: int = 1) -> int:
    """Return a TPU compiler's estimate of the cycles that all launches take together.

    It takes a gather of single elements for nearly free, which it is not: read the memory traffic beside it.
    """
    total = 0
    for instruction, times in executed(program, trips, in_graphs=True):
        found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        total += times * int(found[1]) if found else 0
    return total
