"""Parses the text of a compiled program: scheduled HLO, as ``jax.stages.Compiled.as_text()`` returns it.

Parses only what planning needs: instructions with their shapes, operands and attributes; how often a loop runs; how
many multiply-adds a convolution does. On a TPU, every matrix product is a convolution.
"""

import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"(?:^|, )(?:/\*index=\d+\*/)?%?([a-zA-Z_][\w.\-]*)")
_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # the others have their bits in their name


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's dtype and sizes; ``in_hbm`` is False if the compiler keeps it in the chip's own memory."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool

    @property
    def num_bytes(self) -> int:
        """Without the layout's padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0]) if re.search(r"\d", self.dtype) else 0
        return math.prod(self.sizes) * bits // 8


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in a text such as ``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}``, or in a tuple of them."""
    return tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), not re.search(r"S\(\d+\)", layout or ""))
        for dtype, sizes, layout in _SHAPE.findall(text)
    )


# For example: replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. ``argument`` is the text in the parentheses, ``attributes`` the text after them."""

    name: str
    shape_text: str
    opcode: str
    argument: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return parse_shapes(self.shape_text)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_OPERAND.findall(self.argument))

    def attribute(self, name: str) -> str | None:
        """The computation that ``calls``, ``body``, ``condition`` or ``to_apply`` names; None without it."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the Python program it comes from; empty if the compiler does not state it."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""  # the compiler escapes quotes

    @functools.cached_property
    def estimated_cycles(self) -> int | None:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def channel(self) -> str:
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else self.name

    def group_size(self, num_devices: int) -> int:
        """How many devices take part in a collective.

        Raises:
          ValueError: the text of ``replica_groups`` has an unknown form.
        """
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", self.attributes):
            return len(found[1].split(","))
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", self.attributes):
            return int(found[1])
        if found := _MESH_GROUPS.search(self.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'axis_0':(1)2 is a part of an axis, of size 2
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        if found := re.search(r"replica_groups=(?!\{\})\S*", self.attributes):
            raise ValueError(f"the compiler writes groups of devices in a form that is not known: {found[0]}")
        return num_devices


Computation = dict[str, Instruction]  # by name, in the order in which they run


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of its entry computation."""

    computations: dict[str, Computation]
    entry: str
    is_scheduled: bool
    num_devices: int

    def root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation].values() if one.is_root)

    @functools.cached_property
    def _opcodes(self) -> dict[str, frozenset[str]]:
        return {}

    def opcodes(self, computation: str) -> frozenset[str]:
        """All opcodes of a computation and of the computations that it calls."""
        if computation not in self._opcodes:
            found = set()
            for instruction in self.computations.get(computation, {}).values():
                found.add(instruction.opcode)
                called = instruction.attribute("calls")
                if called:
                    found |= self.opcodes(called)
            self._opcodes[computation] = frozenset(found)
        return self._opcodes[computation]


def parse_module(text: str) -> Module:
    """Parses a whole program.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    lines = text.splitlines()
    for line in lines:
        if not line.startswith((" ", "\t")):
            header = _HEADER.match(line)
            current = None
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, argument, attributes = found.groups()
            current[name] = Instruction(name, shape, opcode, argument, attributes, bool(root))
    if entry is None:
        raise ValueError("the compiled program has no entry computation")
    devices = re.search(r"num_partitions=(\d+)", lines[0])
    return Module(computations, entry, "is_scheduled=true" in lines[0], int(devices[1]) if devices else 1)


_PASS_THROUGH = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


def _resolve(computation: Computation, name: str) -> Instruction | None:
    """The instruction of this name, or the one whose result it only copies, reshapes or converts."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in _PASS_THROUGH and instruction.operands:
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    instruction = _resolve(computation, name)
    if instruction is not None and instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument):
        return int(instruction.argument)
    return None


def _tuple_index(computation: Computation, name: str) -> int | None:
    """The index of this value in the loop's state, or None if it is not in the state."""
    instruction = _resolve(computation, name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    source = computation.get(instruction.operands[0])
    if source is None or source.opcode != "parameter":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """How often a ``while`` runs, or None if its condition does not count up to a constant."""
    condition = module.computations.get(loop.attribute("condition"), {})
    compare = next((one for one in condition.values() if one.is_root), None)
    start = _resolve(caller, loop.operands[0])

    def initial(index: int | None) -> int | None:
        if index is None or start is None or start.opcode != "tuple":
            return None
        return _constant(caller, start.operands[index])

    if compare is not None and compare.opcode == "fusion":
        # The comparison is alone in a fusion: look up the fusion's operands instead of its parameters.
        inner = module.computations.get(compare.attribute("calls"), {})
        outer = compare.operands
        compare = next((one for one in inner.values() if one.is_root), None)
        if compare is None or compare.opcode != "compare":
            return None
        names = []
        for operand in compare.operands:
            source = _resolve(inner, operand)
            is_parameter = source is not None and source.opcode == "parameter"
            names.append(outer[int(source.argument)] if is_parameter else operand)
        lookups = [condition if name in condition else inner for name in names]
    elif compare is not None and compare.opcode == "compare":
        names, lookups = list(compare.operands), [condition, condition]
    else:
        return None
    direction = re.search(r"direction=(\w+)", compare.attributes)[1]
    values = []
    for lookup, name in zip(lookups, names, strict=True):
        index = _tuple_index(lookup, name)
        constant = _constant(lookup, name)
        values.append((index, constant if constant is not None else initial(index)))
    (index, first), (other, bound) = values
    if direction in ("GT", "GE"):  # bound > counter
        (index, first), (other, bound) = values[1], values[0]
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if index is None or index == other or bound is None or direction not in ("LT", "LE"):
        return None
    body = module.computations.get(loop.attribute("body"), {})
    step = _increment(body, index)
    if step is None or step <= 0:
        return None
    return max(0, math.ceil((bound + (direction == "LE") - (first or 0)) / step))


def _increment(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to an element of its state; 1 if the addition is of another form."""
    root = next((one for one in body.values() if one.is_root), None)
    if root is None or root.opcode != "tuple":
        return 1
    added = _resolve(body, root.operands[index])
    if added is None or added.opcode != "add":
        return 1
    steps = [_constant(body, operand) for operand in added.operands]
    return next((step for step in steps if step is not None), 1)


def convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Twice the multiply-adds of a ``convolution`` or ``dot``, without those on padding and on holes of a dilation.

    On a TPU, batched matrix products are convolutions, too: their batch is a spatial axis, dilated so that only one
    element of each window is not a hole.
    """
    left, right = (computation[name].shapes[0].sizes for name in instruction.operands[:2])
    output = instruction.shapes[0].sizes
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2 * math.prod(output) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, output_labels = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def window_field(name: str, axis: int, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    positions = 1
    for axis in range(len(left_labels) - 2):
        low = int(window_field("pad", axis, "0_0").split("_")[0])  # padding at the end is never counted
        sizes = (
            left[left_labels.index(str(axis))],
            right[right_labels.index(str(axis))],
            output[output_labels.index(str(axis))],
        )
        dilations = (int(window_field("lhs_dilate", axis, "1")), int(window_field("rhs_dilate", axis, "1")))
        positions *= _valid_positions(sizes, int(window_field("stride", axis, "1")), low, dilations)
    batch, features = output[output_labels.index("b")], output[output_labels.index("f")]
    return 2 * positions * batch * features * right[right_labels.index("i")]


@functools.cache
def _valid_positions(sizes: tuple[int, int, int], stride: int, pad: int, dilations: tuple[int, int]) -> int:
    """Along one axis, how many pairs of a kernel index and an output index use an element of the input.

    Args:
      sizes: of the input, the kernel and the output along this axis.
      stride: stride of the kernel.
      pad: number of elements of padding before the input.
      dilations: of the input and of the kernel.
    """
    (size, kernel, output), (size_dilation, kernel_dilation) = sizes, dilations
    extent = (size - 1) * size_dilation + 1
    count = 0
    for k in range(kernel):
        offset = k * kernel_dilation - pad
        first = max(0, -(offset // stride))
        last = min(output - 1, (extent - 1 - offset) // stride)
        if last < first:
            continue
        # Count those of these outputs for which stride * o + offset is a multiple of the dilation.
        common = math.gcd(stride, size_dilation)
        if offset % common:
            continue
        period = size_dilation // common
        hit = next(o for o in range(first, first + period) if (stride * o + offset) % size_dilation == 0)
        if hit <= last:
            count += (last - hit) // period + 1
    return count
