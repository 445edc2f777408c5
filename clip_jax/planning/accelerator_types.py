"""Google's names of TPU slices, such as v5p-128, and the topology of each.

The number in a name counts TensorCores, two on each chip, for v2, v3, v4 and v5p, and chips for v5e and v6e. Sources:
docs.cloud.google.com/tpu/docs/v5e and /v5p, and the lists in github.com/AI-Hypercomputer/xpk (v5p) and MaxText (v4, v5e
and v6e). v6e has the shapes of v5e. The sizes of v2 and v3 are from /tpu/docs/regions-zones, which has no shapes: the
shapes here are those nearest to a square.
"""

import difflib
import math
import re

_CHIPS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CORES_V2 = {8: "2x2", 32: "4x4", 128: "8x8", 256: "8x16", 512: "16x16"}
_CORES_V3 = _CORES_V2 | {64: "4x8", 1024: "16x32", 2048: "32x32"}
_CORES_BELOW_A_CUBE = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4"}
_CORES_V4 = _CORES_BELOW_A_CUBE | {
    128: "4x4x4",
    256: "4x4x8",
    384: "4x4x12",
    512: "4x8x8",
    1024: "8x8x8",
    1536: "8x8x12",
    2048: "8x8x16",
    4096: "8x16x16",
}


def _shape_in_cubes(cubes: int) -> str | None:
    """The shape of this many 4x4x4 cubes that is nearest to a cube; None if a side is longer than 256 chips."""
    shapes = [
        (a, b, cubes // (a * b))
        for a in range(1, math.isqrt(cubes) + 1)
        for b in range(a, cubes // a + 1)
        if cubes % (a * b) == 0 and b <= cubes // (a * b)
    ]
    shape = min(shapes, key=lambda sides: (sum(sides), sides))
    return "x".join(str(4 * side) for side in shape) if max(shape) <= 64 else None


_CORES_V5P = _CORES_BELOW_A_CUBE | {
    128 * cubes: shape for cubes in range(1, 97) if (shape := _shape_in_cubes(cubes)) is not None
}
# From the start of a name to the generation and the shape of each size. Of two names, Google's API takes the first.
_FAMILIES = {
    "v2": ("v2", _CORES_V2),
    "v3": ("v3", _CORES_V3),
    "v4": ("v4", _CORES_V4),
    "v5litepod": ("v5e", _CHIPS_2D),
    "v5e": ("v5e", _CHIPS_2D),
    "v5p": ("v5p", _CORES_V5P),
    "v6e": ("v6e", _CHIPS_2D),
}
ACCELERATOR_TYPES = {
    f"{family}-{size}": f"{generation}:{shape}"
    for family, (generation, sizes) in _FAMILIES.items()
    for size, shape in sizes.items()
}


def _same_slice(topology: str) -> tuple[str, tuple[int, ...]]:
    generation, _, shape = topology.partition(":")
    return generation, tuple(sorted(int(side) for side in shape.split("x")))


_NAMES = {_same_slice(topology): name for name, topology in reversed(ACCELERATOR_TYPES.items())}


def accelerator_type(topology: str) -> str | None:
    """Google's name of a slice, such as ``v5p-512`` for ``v5p:8x8x4``; None if the shape has no name."""
    return _NAMES.get(_same_slice(topology))


def nearest_types(family: str, size: int) -> str:
    """Google's next smaller and next larger size, in words: ``v5litepod-8 (2x4) and ...``."""
    sizes = _FAMILIES[family][1]
    near = [
        max((one for one in sizes if one < size), default=None),
        min((one for one in sizes if one > size), default=None),
    ]
    return " and ".join(f"{family}-{one} ({sizes[one]})" for one in near if one is not None)


def unsold_size_message(name: str) -> str | None:
    """The error text for a well-formed name with a size that Google does not have; None for any other word."""
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    if not found or found[1] not in _FAMILIES:
        return None
    family, size = found[1], int(found[2])
    unit = "chips" if _FAMILIES[family][1] is _CHIPS_2D else "TensorCores, two on each chip"
    return f"Google has no {family} slice of {size} {unit}; the nearest are {nearest_types(family, size)}"


def near_matches(word: str) -> list[str]:
    """Names and topologies that are similar to a wrong word; one if only its punctuation is wrong."""
    plain = re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-").removeprefix("tpu-")
    plain = re.sub(r"(?<=\d)-(?=\d)", "x", plain).replace("-", "")
    shape = re.fullmatch(r"(v2|v3|v4|v5e|v5litepod|v5p|v6e)?(\d+(?:x\d+)+)", plain)
    topologies = list(dict.fromkeys(ACCELERATOR_TYPES.values()))
    if shape and shape[1]:
        family = _FAMILIES[shape[1]][0]
        if any(topology.count("x") == shape[2].count("x") for topology in topologies if topology.startswith(family)):
            return [f"{family}:{shape[2]}"]
    if shape and not shape[1]:
        return [topology for topology in topologies if topology.endswith(f":{shape[2]}")]
    by_plain = {re.sub("[-:]", "", name): name for name in (*ACCELERATOR_TYPES, *topologies)}
    if plain in by_plain:
        return [by_plain[plain]]
    return [by_plain[one] for one in difflib.get_close_matches(plain, by_plain, 3, 0.75)]
