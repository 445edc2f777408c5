"""Counts the cycles, flops, bytes and collectives of a compiled step along its schedule, including loops.

The cycles are the ``estimated_cycles`` that the compiler states for each operation that it schedules. It states none
for collectives, which are listed separately, nor for handwritten kernels and a few others, listed as not counted.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from clip_jax.planning.hlo import Computation, Instruction, Module, convolution_flops, parse_module, trip_count

PARTS = ("vision tower", "text tower", "loss", "optimizer", "other")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS = frozenset(("convolution", "dot"))
# Operations that take no time of their own, or wait for asynchronous work.
FREE = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "reshape", "iota", "domain"),
        *("partition-id", "replica-id", "after-all", "opt-barrier", "add-dependency"),
        *("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-update", "async-done"),
    )
)
SCALAR = 64  # elements; operations up to this size run on the scalar core and need no estimate


def part_of(op_name: str) -> str:
    """The one of :data:`PARTS` that an operation belongs to, by where in the program it comes from."""
    if "encode_image" in op_name or "/vision/" in op_name:
        return "vision tower"
    if "encode_text" in op_name or "/text/" in op_name:
        return "text tower"
    if "jvp" in op_name or "shard_map" in op_name or "loss" in op_name:
        return "loss"
    return "optimizer" if op_name else "other"


def direction_of(op_name: str) -> str:
    """``forward``, ``backward`` or ``recomputed`` (for the backward pass); empty outside of a gradient."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else ""


def label_of(op_name: str) -> str:
    """``jit(f)/jvp(CLIP)/CLIP.encode_image/vision/while/body/blocks/fc1/dot_general`` as ``blocks/fc1/dot_general``."""
    plain = re.sub(r"\['(\w+)'\]", r"/\1", op_name)  # a parameter: state.params['text']['token_embedding']
    plain = re.sub(r"\b(?:jit|jvp|transpose|vmap|checkpoint|remat|pjit)\((?:[^()]|\([^()]*\))*\)", "", plain)
    skipped = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "vision", "text", "CLIP"}
    names = [
        name
        for name in plain.split("/")
        if name and name not in skipped and not name.startswith("CLIP.") and not re.fullmatch(r"branch_\d+_fun", name)
    ]
    return "/".join(names[-3:]) or "(unnamed)"


@dataclasses.dataclass
class Collective:
    """A collective in the schedule.

    ``num_bytes`` is the size of its larger side on one chip. ``times`` is how often it runs in a step.
    ``overlapped_cycles`` are the cycles scheduled between its start and its end, 0 if it is synchronous.
    """

    kind: str
    num_bytes: int
    group_size: int
    times: int
    asynchronous: bool
    op_name: str
    overlapped_cycles: int = 0

    @property
    def received_bytes(self) -> float:
        """The fewest bytes that a chip must receive each time: those it does not hold, by the best algorithm."""
        others = (self.group_size - 1) / self.group_size
        shares = {"all-reduce": 2 * others, "collective-permute": 1.0}
        return self.num_bytes * shares.get(self.kind, others)


@dataclasses.dataclass
class Program:
    """A step on one chip. Cycles are by (part, direction, kind of work, label); the other sums are for the step."""

    cycles: collections.Counter
    matmul_flops: int
    hbm_bytes: int
    collectives: list[Collective]
    not_counted: collections.Counter  # opcode or kernel: how often it runs
    unknown_loops: int
    is_scheduled: bool

    def to_dict(self) -> dict:
        """The fields as JSON types."""
        fields = {
            "cycles": [[*key, cycles] for key, cycles in self.cycles.items()],
            "collectives": [
                dataclasses.asdict(one) | {"received_bytes": one.received_bytes} for one in self.collectives
            ],
            "not_counted": dict(self.not_counted),
        }
        return dataclasses.asdict(self) | fields


def read_program(text: str) -> Program:
    """Counts what one run of a scheduled HLO module, given as text, does."""
    return Walk(parse_module(text)).run()


class Walk:
    """Walks through a module in execution order, and counts each operation that runs by itself in :meth:`leaf`."""

    def __init__(self, module: Module):
        self._module = module
        self._program = Program(collections.Counter(), 0, 0, [], collections.Counter(), 0, module.is_scheduled)
        self._names: dict[str, str] = {}

    def run(self) -> Program:
        self._walk(self._module.entry, 1, "")
        return self._program

    def _walk(self, computation_name: str, times: int, caller: str) -> int:
        """Counts a computation that runs ``times`` times, and returns the cycles of one run."""
        computation = self._module.computations[computation_name]
        open_collectives: dict[str, Collective] = {}
        total = 0
        for instruction in computation.values():
            cycles = 0
            if instruction.opcode == "while":
                trips = trip_count(self._module, computation, instruction)
                self._program.unknown_loops += trips is None
                trips = 1 if trips is None else trips
                name = instruction.op_name or caller
                cycles = trips * self._walk(instruction.attribute("body"), times * trips, name)
            elif instruction.opcode == "conditional":
                cycles = self._walk_costliest(instruction, times, caller)
            elif instruction.opcode == "call":
                cycles = self._walk(instruction.attribute("to_apply"), times, instruction.op_name or caller)
            elif self._is_end(instruction):
                for channel in self._channels(instruction, computation):
                    open_collectives.pop(channel, None)
            elif collective := self._collective(instruction, computation, times):
                self._program.collectives.append(collective)
                if collective.asynchronous:
                    for channel in self._channels(instruction, computation):
                        open_collectives[channel] = collective
            else:
                cycles = self.leaf(instruction, computation, times, caller)
            total += cycles
            for collective in open_collectives.values():
                collective.overlapped_cycles += cycles
        return total

    def _walk_costliest(self, instruction: Instruction, times: int, caller: str) -> int:
        """Counts the branch of a conditional that has the most cycles, and returns them."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        branches = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        branches = branches or [instruction.attribute(f"{which}_computation") for which in ("true", "false")]
        before, best = self._program, None
        for branch in branches:
            walk = Walk(self._module)
            cycles = walk._walk(branch, times, instruction.op_name or caller)
            if best is None or cycles > best[0]:
                best = (cycles, walk._program)
        cycles, taken = best
        before.cycles.update(taken.cycles)
        before.not_counted.update(taken.not_counted)
        before.matmul_flops += taken.matmul_flops
        before.hbm_bytes += taken.hbm_bytes
        before.collectives += taken.collectives
        before.unknown_loops += taken.unknown_loops
        return cycles

    def _inner(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """All instructions of the computations that a fusion or an asynchronous start calls."""
        called = instruction.attribute("calls")
        for inner in self._module.computations.get(called, {}).values() if called else ():
            yield self._module.computations[called], inner
            yield from self._inner(inner)

    def _custom_calls(self, instruction: Instruction) -> set[str]:
        return {
            found[1]
            for _, inner in self._inner(instruction)
            if (found := re.search(r'custom_call_target="(\w+)"', inner.attributes))
        }

    def _is_end(self, instruction: Instruction) -> bool:
        opcode = instruction.opcode
        if opcode.endswith("-done"):
            return opcode.removesuffix("-done") in (*COLLECTIVES, "async")
        return opcode == "fusion" and "AsyncCollectiveDone" in self._custom_calls(instruction)

    def _channels(self, instruction: Instruction, computation: Computation) -> set[str]:
        """The names or channels that match the end of an asynchronous collective with its start."""
        if instruction.opcode.endswith("-done"):
            start = instruction.operands[0]
            while computation[start].opcode.endswith("-update"):
                start = computation[start].operands[0]
            return {start}
        if instruction.opcode.endswith("-start"):
            return {instruction.name}
        return {inner.channel for _, inner in self._inner(instruction) if inner.opcode in COLLECTIVES}

    def _collective(self, instruction: Instruction, computation: Computation, times: int) -> Collective | None:
        """The collective that an instruction is, starts, or contains as a fusion's only work; None if there is none."""
        opcode, asynchronous = instruction.opcode, instruction.opcode.endswith("-start")
        kind, source, where = opcode.removesuffix("-start"), instruction, computation
        if kind not in COLLECTIVES:
            if opcode not in ("fusion", "async-start"):
                return None
            found = next((pair for pair in self._inner(instruction) if pair[1].opcode in COLLECTIVES), None)
            if found is None:
                return None
            targets = self._custom_calls(instruction)
            asynchronous = opcode == "async-start" or "AsyncCollectiveStart" in targets
            if not asynchronous and (instruction.estimated_cycles or "kind=kCustom" not in instruction.attributes):
                return None  # other work, with a part of a collective that started before
            where, source = found
            kind = source.opcode
            called = instruction.attribute("calls")
            if kind == "all-reduce" and "dynamic-slice" in self._module.opcodes(called):
                kind = "reduce-scatter"  # each chip keeps only its part of the sum
        sides = [_num_bytes(source.shapes[:1] if asynchronous and source is instruction else source.shapes)]
        sides.append(_num_bytes(shape for name in source.operands if name in where for shape in where[name].shapes))
        if asynchronous and source is instruction and len(source.shapes) > 1:
            sides.append(_num_bytes(source.shapes[1:2]))
        name = instruction.op_name or source.op_name
        return Collective(kind, max(sides), source.group_size(self._module.num_devices), times, asynchronous, name)

    def leaf(self, instruction: Instruction, computation: Computation, times: int, caller: str) -> int:
        """Counts an operation that runs by itself, and returns its cycles."""
        flops = self.matmul_flops(instruction, computation)
        self._program.matmul_flops += times * flops
        self._program.hbm_bytes += times * self.hbm_bytes(instruction, computation)
        cycles = instruction.estimated_cycles
        if cycles is None:
            target = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
            large = any(math.prod(shape.sizes) > SCALAR for shape in instruction.shapes)
            if target and target[1] not in ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"):
                self._program.not_counted[target[1]] += times
            elif instruction.opcode not in FREE and not target and large:
                origin = label_of(self.op_name(instruction) or caller)
                self._program.not_counted[f"{instruction.opcode} of {origin}"] += times
            return 0
        name = self.op_name(instruction) or caller
        work = "matrix products" if flops else "elementwise, reductions and copies"
        self._program.cycles[part_of(name), direction_of(name), work, label_of(name)] += times * cycles
        return cycles

    def op_name(self, instruction: Instruction) -> str:
        """The operation's own, or the longest of the operations fused into it."""
        if instruction.op_name:
            return instruction.op_name
        if instruction.name not in self._names:
            names = [inner.op_name for _, inner in self._inner(instruction)]
            self._names[instruction.name] = max(names, key=len, default="")
        return self._names[instruction.name]

    def matmul_flops(self, instruction: Instruction, computation: Computation) -> int:
        if instruction.opcode in PRODUCTS:
            return convolution_flops(computation, instruction)
        return sum(convolution_flops(where, one) for where, one in self._inner(instruction) if one.opcode in PRODUCTS)

    def hbm_bytes(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes read from and written to HBM. An array that is only sliced or updated in place counts as the slice."""
        opcode = instruction.opcode
        if opcode in (
            "copy-start",
            "slice-start",
            "async-start",
        ):  # of (destination, source, ...) or (source, destination, ...)
            pair = instruction.shapes[:2]
            moved = min(shape.num_bytes for shape in pair)
            return moved * sum(shape.in_hbm for shape in pair)
        if opcode in FREE:
            return 0
        called = instruction.attribute("calls")
        body = self._module.computations.get(called, {}) if called else {}
        total = 0
        parameters = {one.argument: one.name for one in body.values() if one.opcode == "parameter"}
        for place, operand in enumerate(instruction.operands):
            shapes = computation[operand].shapes if operand in computation else ()
            whole = sum(shape.num_bytes for shape in shapes if shape.in_hbm)
            if not whole:
                continue
            name = parameters.get(str(place))
            users = [one for one in body.values() if name in one.operands] if name else [instruction]
            total += min(whole, sum(_read_bytes(user, name or operand, whole) for user in users))
        root = next((one for one in body.values() if one.is_root), None) if body else instruction
        written = sum(shape.num_bytes for shape in instruction.shapes if shape.in_hbm)
        if root is not None and written:
            where = body or computation
            while root.opcode == "bitcast" and root.operands[0] in where:
                root = where[root.operands[0]]
            if root.opcode == "dynamic-update-slice":
                written = min(written, _num_bytes(where[root.operands[1]].shapes))
        return total + written


def _num_bytes(shapes) -> int:
    return sum(shape.num_bytes for shape in shapes)


def _read_bytes(user: Instruction, name: str, whole: int) -> int:
    """How many bytes one of its users reads of an array of ``whole`` bytes."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return _num_bytes(user.shapes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0  # in place
    return whole
