"""The TPU generations that can be planned for, and the slices of each.

A device is one of JAX's devices: a chip, or on v2 and v3 one of a chip's two TensorCores, with half of its figures.
Peak, HBM and interconnect are those that Google publishes for each chip, at docs.cloud.google.com/tpu/docs/v3, /v4,
/v5e, /v5p and /v6e. All of v2 and the links of v3 are from "The Design Process for Google's Training Chips: TPUv2 and
TPUv3" (IEEE Micro 41, 2021), quoted from memory and not checked against it. The clock is not published everywhere. It
is chosen so that the compiler's cycles for a bfloat16 product of 8,192 x 8,192 matrices, which cannot exceed the peak,
give ``matmul_share`` of it. For v6e and v5p it is also the peak divided by what the chip's matrix units do in a cycle.
"""

import dataclasses
import math
import re

from clip_jax.planning.accelerator_types import ACCELERATOR_TYPES, accelerator_type, near_matches, unsold_size_message

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of chips, with figures for one device.

    ``peak_flops`` is per second in bfloat16. ``hbm_bytes`` is the published size, of which the compiler leaves some to
    the runtime (1/4 GiB on v5e). ``hbm_bandwidth`` is in bytes a second. ``interconnect`` is what all links together
    carry in one direction, in bytes a second. ``clock`` is in cycles a second. ``matmul_share`` is the share of the
    peak that the compiler's cycles predict for a product of 8,192 x 8,192 matrices (libtpu 0.0.42.1). ``axes`` is how
    many numbers a slice's shape has.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    interconnect: float
    clock: float
    matmul_share: float
    axes: int
    chip_config_name: str | None = None  # makes libtpu treat a chip's two cores as one device
    devices_per_chip: int = 1


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v2", 23e12, 8 * GIB, 350e9, 124e9, 0.7e9, 0.98, 2, devices_per_chip=2),
        Generation("v3", 61.5e12, 16 * GIB, 450e9, 164e9, 0.94e9, 0.97, 2, devices_per_chip=2),
        Generation("v4", 275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, 0.93, 3, "megacore"),
        Generation("v5e", 197e12, 16 * GIB, 819e9, 200e9, 1.5e9, 0.88, 2),
        Generation("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 1.75e9, 0.90, 3),
        Generation("v6e", 918e12, 32 * GIB, 1638e9, 400e9, 1.75e9, 0.70, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its generation and its shape in chips. ``name`` is the topology, such as ``v5p:4x4x4``."""

    name: str
    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator_type(self) -> str | None:
        """Google's name of the slice, such as ``v5p-128``; None if the shape has no name."""
        return accelerator_type(self.name)


def parse_topology(name: str, flag: str = "--topology") -> Topology:
    """Parses a topology, such as ``v5p:8x8x4``, or Google's name of a slice, such as ``v5p-512``.

    Only the compiler checks whether a slice with this topology exists.

    Args:
      name: the value that the user gave.
      flag: the flag that has this value, for the error message.

    Raises:
      ValueError: there is no such generation or size, or the shape is malformed; the message lists similar slices.
    """
    topology = ACCELERATOR_TYPES.get(name, name)
    generation_name, _, shape = topology.partition(":")
    generation = GENERATIONS.get(generation_name)
    if generation is None or not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * generation.axes), shape):
        raise ValueError(f"{flag}={name}: {unsold_size_message(name) or _no_such_slice(name)}")
    return Topology(topology, generation, tuple(int(size) for size in shape.split("x")))


def named_slices(generation: Generation) -> list[Topology]:
    """The slices of a generation that Google has a name for, smallest first."""
    topologies = dict.fromkeys(one for one in ACCELERATOR_TYPES.values() if one.startswith(f"{generation.name}:"))
    return sorted(map(parse_topology, topologies), key=lambda one: one.chips)


def nearest_slices(topology: Topology) -> str:
    """The named slices with the next smaller and the next larger number of chips, in words."""
    named = named_slices(topology.generation)
    below = [one for one in named if one.chips <= topology.chips][-1:]
    above = [one for one in named if one.chips >= topology.chips][:1]
    return " and ".join(dict.fromkeys(f"{one.name} ({one.accelerator_type})" for one in below + above))


def _no_such_slice(name: str) -> str:
    near = near_matches(name)
    axes = ", ".join(f"{one.name}:{'x'.join('ABC'[: one.axes])}" for one in GENERATIONS.values())
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    return (
        f"no such slice{meant} Slices are written {axes} with the number of chips along each axis, or as Google names "
        "them: v2-N, v3-N, v4-N, v5litepod-N, v5p-N, v6e-N"
    )
