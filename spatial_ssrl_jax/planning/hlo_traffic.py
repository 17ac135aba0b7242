"""Memory and network traffic of a compiled program, read from its text.

The compiler's own cost analysis counts the body of a loop once; here trip counts are multiplied in.
A computation's bytes are the operands and results of its top-level instructions, for what happens
inside a fusion stays on the chip; of an array that is only sliced, or written in one place, just
that slice counts. Arrays that the compiler keeps out of the main memory (`S(1)` in their layout)
cost nothing.

A TPU's collectives may run beside other work: one then is in a fusion that starts it, in those
that it runs beside, and in one that ends it, each time under the same channel. It counts once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from spatial_ssrl_jax.planning.hlo import (
    ARRAY,
    FREE,
    Computation,
    HloModule,
    Instruction,
    array_bytes,
    without_layout,
)
from spatial_ssrl_jax.planning.hlo_collectives import sent_bytes

_CHANNEL = re.compile(r"channel_id=(\d+)")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device moves.

    Attributes:
      memory: read from and written to its main memory.
      network: sent to other devices of its slice.
      dcn: sent to other slices, over the data-centre network.
    """

    memory: float = 0.0
    network: float = 0.0
    dcn: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.memory + other.memory, self.network + other.network, self.dcn + other.dcn
        )

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.memory * times, self.network * times, self.dcn * times)


def program_traffic(
    text: str,
    slice_size: int | None = None,
    slices: int = 1,
    trip_count: float = 1.0,
    expensive_fraction: float = 1.0,
) -> Traffic:
    """Traffic of one run of a compiled program, on one device.

    Args:
      text: the compiled module, as XLA prints it.
      slice_size: devices of a slice, numbered consecutively; None is one slice.
      slices: number of slices.
      trip_count: of a loop whose length the compiler does not know.
      expensive_fraction: how often a conditional takes its most expensive branch; else it takes the
        cheapest.
    """
    module = HloModule(text)
    return _TrafficCounter(module, slice_size, slices, trip_count, expensive_fraction).total()


class _TrafficCounter:
    """Sums traffic over a module's computations; see `program_traffic` for its arguments."""

    def __init__(
        self,
        module: HloModule,
        slice_size: int | None,
        slices: int,
        trip_count: float,
        expensive_fraction: float,
    ):
        self.module, self.slice_size, self.slices = module, slice_size, slices
        self.trip_count, self.expensive_fraction = trip_count, expensive_fraction
        self.repeated = set[str]()  # collectives that an earlier fusion has started
        for found in module.computations.values():
            self._mark_repeated(found)
        self.done: dict[str, Traffic] = {}

    def total(self) -> Traffic:
        return self._computation(self.module.entry)

    def _mark_repeated(self, inside: Computation) -> None:
        begun = set[str]()
        for fusion in (i for i in inside.instructions if i.opcode == "fusion"):
            for i in self.module.computations[fusion.called[0]].instructions:
                if (channel := _CHANNEL.search(i.text)) is None:
                    continue
                if channel[1] in begun:
                    self.repeated.add(i.name)
                begun.add(channel[1])

    def _computation(self, name: str) -> Traffic:
        if name not in self.done:
            inside = self.module.computations[name]
            parts = (self._instruction(inside, i) for i in inside.instructions)
            self.done[name] = sum(parts, Traffic())
        return self.done[name]

    def _instruction(self, inside: Computation, instruction: Instruction) -> Traffic:
        opcode = instruction.opcode
        if opcode == "while":
            known = self.module.trip_count(inside, instruction)
            count = self.trip_count if known is None else known
            return sum(map(self._computation, instruction.called), Traffic()) * count
        if opcode == "conditional":
            costs = sorted(map(self._computation, instruction.branches), key=lambda t: t.memory)
            fraction = self.expensive_fraction
            return costs[-1] * fraction + costs[0] * (1 - fraction)
        if opcode in ("call", "async-start"):
            return sum(map(self._computation, instruction.called), Traffic())
        total = Traffic(self._memory(inside, instruction)) + self._sent(inside, instruction)
        if opcode == "fusion":
            # A collective that runs beside other work is in a fusion of its own.
            total += sum(map(self._sent_inside, instruction.called), Traffic())
        return total

    def _sent(
        self, inside: Computation, instruction: Instruction, scattered: bool = False
    ) -> Traffic:
        """What one collective sends; nothing for any other instruction.

        Args:
          inside: the computation that the instruction is in.
          instruction: a collective or not.
          scattered: whether each device takes only its shard of an all-reduce.
        """
        if instruction.name in self.repeated:
            return Traffic()
        opcode = instruction.opcode
        if scattered and opcode == "all-reduce":
            opcode = "reduce-scatter"
        given = sum(
            array_bytes(without_layout(x)) for x in self._operand_shapes(inside, instruction)
        )
        return Traffic(
            0.0, *sent_bytes(opcode, given, instruction.text, self.slice_size, self.slices)
        )

    def _sent_inside(self, name: str) -> Traffic:
        inside = self.module.computations[name]
        total = Traffic()
        for i in inside.instructions:
            # A TPU runs an all-reduce and the slice that takes a device's shard as one operation.
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
        if opcode in FREE or opcode.endswith("-done"):
            return 0.0
        if opcode == "fusion":
            return self._fusion(inside, instruction)
        if opcode in _SLICES:
            return 2 * array_bytes(instruction.shape)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * array_bytes(shapes[1 if opcode == "dynamic-update-slice" else 2])
        if opcode == "copy-start":  # (result, operand, …)
            return array_bytes(next(ARRAY.finditer(instruction.shape))[0]) + array_bytes(shapes[0])
        if opcode == "slice-start":  # ((operand), result, …)
            _, result, *_ = (found[0] for found in ARRAY.finditer(instruction.shape))
            read = array_bytes(without_layout(result)) if array_bytes(shapes[0]) else 0.0
            return read + array_bytes(result)
        if opcode.endswith("-start"):
            return array_bytes(instruction.shape)  # holds operands and results
        return array_bytes(instruction.shape) + sum(map(array_bytes, shapes))

    def _fusion(self, inside: Computation, instruction: Instruction) -> float:
        body = self.module.computations[instruction.called[0]]
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
                total += array_bytes(without_layout(user.shape))
            elif user.opcode == "tuple" or user.name in self.repeated:
                continue
            elif user.opcode == "bitcast" and user is body.root:
                return whole  # the result of the computation, for an outer one
            elif user.opcode == "bitcast" or (
                user.opcode == "dynamic-update-slice" and user.operands[0] == name
            ):  # an array updated in place may be read whole afterwards, as a cache is
                total += self._read(body, user.name, whole)
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called[0]]
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read(inner, inner.parameters[number], whole)
            else:
                return whole
        return total

    def _written(self, body: Computation, result: Instruction) -> float:
        """Bytes that a fused computation's result writes."""
        operands = [body.by_name[o] for o in result.operands if o in body.by_name]
        if result.opcode == "parameter" or result.name in self.repeated:
            return 0.0
        if result.opcode == "tuple":
            return sum(self._written(body, part) for part in operands)
        if result.opcode == "bitcast" and operands:
            return self._written(body, operands[0])
        if result.opcode == "dynamic-update-slice":
            return array_bytes(without_layout(operands[1].shape))
        if result.opcode == "fusion":
            inner = self.module.computations[result.called[0]]
            return self._written(inner, inner.root)
        return array_bytes(without_layout(result.shape))


def largest_arrays(text: str, count: int) -> Iterator[tuple[float, str]]:
    """Bytes and name of the `count` largest results in a program's text, largest first."""
    module = HloModule(text)
    found = [
        (array_bytes(i.shape), f"{i.opcode} {without_layout(i.shape)[:60]}")
        for c in module.computations.values()
        for i in c.instructions
        if i.opcode not in FREE and not i.shape.startswith("(")
    ]
    yield from sorted(set(found), reverse=True)[:count]
