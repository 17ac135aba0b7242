"""What a compiled program moves, read from its text, with every loop's turns multiplied in.

The compiler's own cost analysis counts the body of a loop once. Here a computation's bytes are the
operands and results of its top-level instructions, for what happens inside a fusion stays on the
chip; of an array that is only sliced, or written in one place, just that part counts. Arrays that
the compiler keeps out of the main memory (`S(1)` in their layout) cost nothing.

A TPU's collectives may run beside other work: one then is in a fusion that starts it, in those
that it runs beside, and in one that ends it, each time under the same channel. It counts once.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from spatial_ssrl_jax.planning.collectives import sent_bytes

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TWO_BRANCHES = re.compile(r"(true|false)_computation=%([\w.\-]+)")

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-update", "add-dependency", "domain",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one device.

    Attributes:
      memory: read from and written to its main memory.
      network: sent to other devices of its slice.
      far: sent to other slices.
    """

    memory: float = 0.0
    network: float = 0.0
    far: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.memory + other.memory, self.network + other.network, self.far + other.far
        )

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.memory * times, self.network * times, self.far * times)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: as the text has it, layouts included; of several results in parentheses.
      opcode: for example `fusion`.
      operands: names, in order.
      inner: what is in its parentheses; the value of a constant, the number of a parameter.
      text: what stands after the operands: attributes.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inner: str
    text: str

    @property
    def called(self) -> list[str]:
        """Computations that it runs, branches apart."""
        return _CALLED.findall(self.text)


@dataclass
class Computation:
    """A named list of instructions; the last one, or the one marked so, is its result."""

    instructions: list[Instruction]
    root: Instruction

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def parameters(self) -> dict[int, str]:
        """The name of each parameter, by its number."""
        return {int(i.inner): i.name for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


def array_bytes(shape: str) -> float:
    """Bytes that the arrays of a shape take in the main memory."""
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if re.search(r"S\([1-9]", layout):
            continue
        total += math.prod(map(int, filter(None, sizes.split(",")))) * _item_bytes(kind)
    return total


def _item_bytes(kind: str) -> float:
    if kind == "pred":
        return 1.0
    if kind.startswith("c"):
        return float(kind[1:]) / 8
    bits = re.match(r"[a-z]+(\d+)", kind)
    return float(bits[1]) / 8 if bits else 0.0


class HloModule:
    """A compiled module's text, taken apart.

    Args:
      text: as XLA prints it.
      slice_size: devices of a slice, whose numbers follow one another; None is one slice.
      slices: how many there are.
    """

    def __init__(self, text: str, slice_size: int | None = None, slices: int = 1):
        self.slice_size, self.slices = slice_size, slices
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%").split("(")[0]
                self.entry = name if line.startswith("ENTRY") else self.entry
                lines = []
            elif line.startswith("}"):
                self.computations[name] = _computation(lines)
            elif line.startswith("  "):
                lines.append(line)
        self.repeated = set[str]()  # collectives that an earlier fusion beside them has begun
        for found in self.computations.values():
            self._mark_repeated(found)

    def _mark_repeated(self, inside: Computation) -> None:
        begun = set[str]()
        for fusion in (i for i in inside.instructions if i.opcode == "fusion"):
            for i in self.computations[fusion.called[0]].instructions:
                if (channel := _CHANNEL.search(i.text)) is None:
                    continue
                if channel[1] in begun:
                    self.repeated.add(i.name)
                begun.add(channel[1])

    def moved(self, unknown_turns: float = 1.0, dear_share: float = 1.0) -> Traffic:
        """What the whole program moves.

        Args:
          unknown_turns: of a loop whose length the compiler does not know.
          dear_share: how often a conditional takes its dearest branch; else it takes the cheapest.
        """
        done: dict[str, Traffic] = {}

        def computation(name: str) -> Traffic:
            if name not in done:
                total = Traffic()
                for instruction in self.computations[name].instructions:
                    total += one(self.computations[name], instruction)
                done[name] = total
            return done[name]

        def one(inside: Computation, instruction: Instruction) -> Traffic:
            opcode = instruction.opcode
            if opcode == "while":
                turns = self.turns(inside, instruction)
                turns = unknown_turns if turns is None else turns
                return sum(map(computation, instruction.called), Traffic()) * turns
            if opcode == "conditional":
                costs = sorted(map(computation, _branches(instruction)), key=lambda m: m.memory)
                return costs[-1] * dear_share + costs[0] * (1 - dear_share)
            if opcode in ("call", "async-start"):
                return sum(map(computation, instruction.called), Traffic())
            total = Traffic(self._memory(inside, instruction)) + self._sent(inside, instruction)
            if opcode == "fusion":
                # A collective that runs beside other work is in a fusion of its own.
                total += sum(map(self._sent_inside, instruction.called), Traffic())
            return total

        return computation(self.entry)

    def turns(self, inside: Computation, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None where that is not a constant.

        The text of a TPU program does not say: it is what the condition compares the counter with,
        less what the counter begins at.
        """
        if known := _TRIPS.search(loop.text):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%([\w.\-]+)", loop.text)[1]]
        test, resolve = condition.root, condition.by_name
        if test.opcode == "fusion":
            inner = self.computations[test.called[0]]
            outer = dict(enumerate(test.operands))
            resolve = inner.by_name | {
                name: condition.by_name[outer[number]] for number, name in inner.parameters.items()
            }
            test = inner.root
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        counter, end = (resolve.get(name) for name in test.operands)
        if end is None or end.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        place = int(re.search(r"index=(\d+)", counter.text)[1])
        first = inside.by_name.get(loop.operands[0])
        first = inside.by_name.get(first.operands[place]) if first and first.operands else None
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = inside.by_name.get(first.operands[0])
        begins = int(first.inner) if first is not None and first.opcode == "constant" else 0
        return int(end.inner) - begins

    def _sent(
        self, inside: Computation, instruction: Instruction, scattered: bool = False
    ) -> Traffic:
        """What one collective sends, near and far; nothing for any other instruction."""
        if instruction.name in self.repeated:
            return Traffic()
        opcode = instruction.opcode
        if scattered and opcode == "all-reduce":
            opcode = "reduce-scatter"
        given = sum(array_bytes(_plain(x)) for x in self._operand_shapes(inside, instruction))
        return Traffic(
            0.0, *sent_bytes(opcode, given, instruction.text, self.slice_size, self.slices)
        )

    def _sent_inside(self, name: str) -> Traffic:
        inside = self.computations[name]
        total = Traffic()
        for i in inside.instructions:
            # A TPU runs an all-reduce of which each device takes its part as one operation.
            users = [user.opcode for user in inside.users.get(i.name, [])]
            total += self._sent(inside, i, scattered=users == ["dynamic-slice"])
            if i.opcode == "fusion":
                total += sum(map(self._sent_inside, i.called), Traffic())
        return total

    def _operand_shapes(self, inside: Computation, instruction: Instruction) -> list[str]:
        known = inside.by_name
        return [known[o].shape for o in instruction.operands if o in known]

    def _memory(self, inside: Computation, instruction: Instruction) -> float:
        """Bytes that one instruction other than a loop or branch reads and writes."""
        opcode, shapes = instruction.opcode, self._operand_shapes(inside, instruction)
        if opcode in _FREE or opcode.endswith("-done"):
            return 0.0
        if opcode == "fusion":
            return self._fusion(inside, instruction)
        if opcode in _SLICES:
            return 2 * array_bytes(instruction.shape)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * array_bytes(shapes[1 if opcode == "dynamic-update-slice" else 2])
        if opcode == "copy-start":  # (result, operand, …)
            return array_bytes(next(_ARRAY.finditer(instruction.shape))[0]) + array_bytes(shapes[0])
        if opcode == "slice-start":  # ((operand), result, …)
            _, result, *_ = (found[0] for found in _ARRAY.finditer(instruction.shape))
            part = array_bytes(_plain(result)) if array_bytes(shapes[0]) else 0.0
            return part + array_bytes(result)
        if opcode.endswith("-start"):
            return array_bytes(instruction.shape)  # holds operands and results
        return array_bytes(instruction.shape) + sum(map(array_bytes, shapes))

    def _fusion(self, inside: Computation, instruction: Instruction) -> float:
        body = self.computations[instruction.called[0]]
        total = self._written(body, body.root) if array_bytes(instruction.shape) else 0.0
        total = min(total, array_bytes(instruction.shape))
        for number, operand in enumerate(instruction.operands):
            whole = array_bytes(inside.by_name[operand].shape) if operand in inside.by_name else 0.0
            if whole and number in body.parameters:
                total += min(whole, self._read(body, body.parameters[number], whole))
        return total

    def _read(self, body: Computation, name: str, whole: float) -> float:
        """Bytes of the value `name` that the instructions of a fused computation need."""
        total = 0.0
        for user in body.users.get(name, []):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += array_bytes(_plain(user.shape))
            elif user.opcode == "tuple" or user.name in self.repeated:
                continue
            elif user.opcode == "bitcast" and user is body.root:
                return whole  # handed on to whatever this computation is in
            elif user.opcode == "bitcast" or (
                user.opcode == "dynamic-update-slice" and user.operands[0] == name
            ):  # what is written in place may be read whole after that, as a cache is
                total += self._read(body, user.name, whole)
            elif user.opcode == "fusion":
                inner = self.computations[user.called[0]]
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read(inner, inner.parameters[number], whole)
            else:
                return whole
        return total

    def _written(self, body: Computation, result: Instruction) -> float:
        """Bytes that a fused computation's result writes."""
        parts = [body.by_name[o] for o in result.operands if o in body.by_name]
        if result.opcode == "parameter" or result.name in self.repeated:
            return 0.0
        if result.opcode == "tuple":
            return sum(self._written(body, part) for part in parts)
        if result.opcode == "bitcast" and parts:
            return self._written(body, parts[0])
        if result.opcode == "dynamic-update-slice":
            return array_bytes(_plain(parts[1].shape))
        if result.opcode == "fusion":
            inner = self.computations[result.called[0]]
            return self._written(inner, inner.root)
        return array_bytes(_plain(result.shape))


def _plain(shape: str) -> str:
    """The shape without layouts, so that all of it counts wherever it is."""
    return re.sub(r"\{[^}]*\}", "", shape)


def _branches(instruction: Instruction) -> list[str]:
    if found := _BRANCHES.search(instruction.text):
        return _NAME.findall(found[1])
    return [name for _, name in _TWO_BRANCHES.findall(instruction.text)]


def _computation(lines: list[str]) -> Computation:
    instructions, root = [], None
    for line in lines:
        text = line.strip()
        is_root = text.startswith("ROOT ")
        name, equals, rest = text.removeprefix("ROOT ").partition(" = ")
        if not equals:
            continue
        shape, rest = _until(rest, lambda c, depth: c == " " and depth == 0)
        opcode = _OPCODE.match(rest)
        if opcode is None:
            continue
        inner, text = _until(rest[opcode.end() :], lambda c, depth: c == ")" and depth == 0)
        operands = tuple(_NAME.findall(inner))
        found = Instruction(name.lstrip("%"), shape, opcode[1], operands, inner, text)
        instructions.append(found)
        root = found if is_root or root is None else root
    return Computation(instructions, root or instructions[-1])


def _until(text: str, ends: Callable[[str, int], bool]) -> tuple[str, str]:
    """`text` up to and after the first character that `ends` accepts, by depth of brackets."""
    depth = 0
    for place, character in enumerate(text):
        if ends(character, depth):
            return text[:place], text[place + 1 :]
        depth += (character in "({[") - (character in ")}]")
    return text, ""


def largest_arrays(text: str, count: int) -> Iterator[tuple[float, str]]:
    """Bytes and name of the largest results in a program's text, for what is short of memory."""
    program = HloModule(text)
    found = [
        (array_bytes(i.shape), f"{i.opcode} {_plain(i.shape)[:60]}")
        for c in program.computations.values()
        for i in c.instructions
        if i.opcode not in _FREE and not i.shape.startswith("(")
    ]
    yield from sorted(set(found), reverse=True)[:count]
