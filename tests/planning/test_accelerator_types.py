"""Google's names of slices, and the topologies that they name."""

import pytest

from clip_jax.planning.accelerator_types import ACCELERATOR_TYPES
from clip_jax.planning.topologies import parse_topology


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        *(("v2-8", "v2:2x2"), ("v3-32", "v3:4x4"), ("v3-2048", "v3:32x32")),
        *(("v4-8", "v4:2x2x1"), ("v4-32", "v4:2x2x4"), ("v4-512", "v4:4x8x8"), ("v4-4096", "v4:8x16x16")),
        *(
            ("v5litepod-1", "v5e:1x1"),
            ("v5litepod-16", "v5e:4x4"),
            ("v5litepod-256", "v5e:16x16"),
            ("v5e-8", "v5e:2x4"),
        ),
        *(("v5p-8", "v5p:2x2x1"), ("v5p-64", "v5p:2x4x4"), ("v5p-128", "v5p:4x4x4"), ("v5p-384", "v5p:4x4x12")),
        *(
            ("v5p-640", "v5p:4x4x20"),
            ("v5p-768", "v5p:4x8x12"),
            ("v5p-1152", "v5p:4x12x12"),
            ("v5p-7168", "v5p:8x16x28"),
        ),
        *(("v5p-7808", "v5p:4x4x244"), ("v5p-11520", "v5p:12x20x24"), ("v5p-12288", "v5p:16x16x24")),
        *(("v6e-4", "v6e:2x2"), ("v6e-32", "v6e:4x8"), ("v6e-128", "v6e:8x16"), ("v6e-256", "v6e:16x16")),
    ],
)
def test_googles_names_are_taken_for_topologies(name, topology):
    named = parse_topology(name)
    assert named == parse_topology(topology)
    assert parse_topology(named.accelerator_type) == named


def test_every_name_counts_what_google_counts():
    assert "v5p-8576" not in ACCELERATOR_TYPES  # 4x4x268 chips: no side is longer than 256
    for name in ACCELERATOR_TYPES:
        family, _, size = name.partition("-")
        assert parse_topology(name).chips == int(size) // (1 if family in ("v5litepod", "v5e", "v6e") else 2), name


def test_a_slice_that_is_turned_has_the_same_name_and_others_have_none():
    names = [parse_topology(one).accelerator_type for one in ("v5p:8x8x4", "v5e:8x4", "v4:16x16x16")]
    assert names == ["v5p-512", "v5litepod-32", None]
