"""The TPU generations that can be planned for, and the slices of each.

Peak, HBM and interconnect are those that Google publishes for each chip, at docs.cloud.google.com/tpu/docs/v4, /v5e,
/v5p and /v6e. The clock is not published everywhere. It is what makes the compiler's cycles for a bfloat16 product of
8,192 x 8,192 matrices, of which nothing can take more than the peak, ``matmul_share`` of that peak; for v6e and v5p it
is also the peak over what the chip's matrix units do a cycle.
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of chips.

    ``peak_flops`` are a second in bfloat16, ``hbm_bytes`` as sold, of which the compiler leaves some to the runtime
    (1/4 GiB on v5e); ``hbm_bandwidth`` is in bytes a second;
    ``interconnect`` is what all links of a chip together carry in one direction, in bytes a second;
    ``clock`` is in cycles a second; ``matmul_share`` is the share of the peak that the compiler's cycles predict for
    a product of 8,192 x 8,192 matrices (libtpu 0.0.52); ``axes`` is how many numbers a slice's shape has.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    interconnect: float
    clock: float
    matmul_share: float
    axes: int
    chip_config_name: str | None = None  # how libtpu has to be told to see a chip's two cores as one device


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v4", 275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, 0.93, 3, "megacore"),
        Generation("v5e", 197e12, 16 * GIB, 819e9, 200e9, 1.5e9, 0.88, 2),
        Generation("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 1.75e9, 0.90, 3),
        Generation("v6e", 918e12, 32 * GIB, 1638e9, 400e9, 1.75e9, 0.70, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its generation and its shape in chips."""

    name: str
    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """Reads ``v5p:8x8x4``. Whether such a slice exists is the compiler's to say.

    Raises:
      ValueError: the generation is unknown or the shape is not of its form; the message lists what is known.
    """
    generation_name, _, shape = name.partition(":")
    generation = GENERATIONS.get(generation_name)
    if generation is None or not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * generation.axes), shape):
        known = ", ".join(f"{one.name}:{'x'.join('ABC'[: one.axes])}" for one in GENERATIONS.values())
        raise ValueError(
            f"--topology={name}: no such slice; they are written {known} with the number of chips along each axis, "
            "for example v5e:16x16 or v5p:8x8x4"
        )
    return Topology(name, generation, tuple(int(size) for size in shape.split("x")))
