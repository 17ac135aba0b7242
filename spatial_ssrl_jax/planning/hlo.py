"""The text of a compiled program: computations, instructions, trip counts of loops."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(true|false)_computation=%([\w.\-]+)")

# Instructions that move nothing.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-update", "add-dependency", "domain",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: as in the text, layouts included; several results are in parentheses.
      opcode: for example `fusion`.
      operands: names, in order.
      inner: text in its parentheses: the value of a constant, the number of a parameter.
      text: attributes, which follow the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inner: str
    text: str

    @property
    def called(self) -> list[str]:
        """Computations that it runs, branches of a conditional excepted."""
        return _CALLED.findall(self.text)

    @property
    def branches(self) -> list[str]:
        """Computations of which a conditional runs one."""
        if found := _BRANCHES.search(self.text):
            return _NAME.findall(found[1])
        return [name for _, name in _TWO_BRANCHES.findall(self.text)]


@dataclass
class Computation:
    """A list of instructions; the result is `root`, the one marked so or else the last."""

    instructions: list[Instruction]
    root: Instruction

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Each instruction by its name."""
        return {i.name: i for i in self.instructions}

    @cached_property
    def parameters(self) -> dict[int, str]:
        """The name of each parameter, by its number."""
        return {int(i.inner): i.name for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that take each value, by its name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


def array_bytes(shape: str) -> float:
    """Bytes of a shape's arrays in the main memory."""
    total = 0.0
    for kind, sizes, layout in ARRAY.findall(shape):
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
    """A compiled module's text, parsed.

    Args:
      text: as XLA prints it.

    Attributes:
      computations: by name.
      entry: the name of the computation that runs first.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = name = ""
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

    def trip_count(self, inside: Computation, loop: Instruction) -> int | None:
        """Iterations of a `while`; None where they are not constant.

        The text of a TPU program does not state them: they are what the condition compares the
        counter with, less the counter's initial value.

        Args:
          inside: the computation that the loop is in.
          loop: the `while`.
        """
        if known := _TRIP_COUNT.search(loop.text):
            return int(known[1])
        counter, end = self._compared(loop)
        if counter is None or counter.opcode != "get-tuple-element":
            return None
        last, index = _constant(end), _INDEX.search(counter.text)
        if last is None or index is None:
            return None
        initial = inside.by_name.get(loop.operands[0])
        if initial is None or initial.opcode != "tuple":
            return last
        start = inside.by_name.get(initial.operands[int(index[1])])
        while start is not None and start.opcode in ("copy", "bitcast"):
            start = inside.by_name.get(start.operands[0])
        if start is None or start.opcode != "constant":
            return last  # counters start at 0
        first = _constant(start)
        return None if first is None else last - first

    def _compared(self, loop: Instruction) -> tuple[Instruction | None, Instruction | None]:
        """Both sides of the `<` that a loop's condition is; None for what is not found."""
        named = _CONDITION.search(loop.text)
        if named is None:
            return None, None
        condition = self.computations[named[1]]
        test, resolve = condition.root, condition.by_name
        if test.opcode == "fusion":
            inner = self.computations[test.called[0]]
            resolve = inner.by_name | {
                name: condition.by_name[test.operands[number]]
                for number, name in inner.parameters.items()
                if test.operands[number] in condition.by_name
            }
            test = inner.root
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None, None
        counter, end = (resolve.get(name) for name in test.operands)
        return counter, end


def _constant(instruction: Instruction | None) -> int | None:
    """The value of an integer constant; None where it is anything else."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.inner) if re.fullmatch(r"-?\d+", instruction.inner) else None


def without_layout(shape: str) -> str:
    """The shape without layouts, so that all of it counts wherever it is."""
    return re.sub(r"\{[^}]*\}", "", shape)


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
        root = found if is_root else root
    return Computation(instructions, root or instructions[-1])


def _until(text: str, ends: Callable[[str, int], bool]) -> tuple[str, str]:
    """`text` before and after the first character that `ends` accepts, given the bracket depth."""
    depth = 0
    for index, character in enumerate(text):
        if ends(character, depth):
            return text[:index], text[index + 1 :]
        depth += (character in "({[") - (character in ")}]")
    return text, ""
