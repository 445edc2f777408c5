"""Advice for a step that does not fit: in order, with what each change saves."""

import re

import pytest
from plans import too_large

from clip_jax.config import override
from clip_jax.planning import searching
from clip_jax.planning.advice import advice
from clip_jax.planning.compiled import parse_out_of_memory
from clip_jax.planning.report import make_report
from clip_jax.planning.topologies import parse_topology


def advised(config, facts, topology="v5e:2x2") -> list[tuple[float, str]]:
    """GiB and option of each line."""
    lines = advice(make_report(config, parse_topology(topology), facts))
    found = [re.search(r"(?:saves|saves about|adds) ([\d.]+) (GiB|MiB): (--\S+)$", line) for line in lines]
    assert all(found), lines
    return [(float(one[1]) / (1 if one[2] == "GiB" else 1024), one[3]) for one in found]


def test_advice_says_what_each_change_saves_the_largest_first(config):
    assert advised(config, too_large()) == [
        (79, "--topology=v5p-8"),
        (26.25, "--topology=v5litepod-32"),  # 10 GiB are taken and 5 left: of 30 GiB an eighth fits
        (26.25, "--config.accumulation_steps=8"),
        (25, "--config.global_batch_size=5460"),
        (19, "--config.model.remat=full"),
        (11, "--config.model.remat=attention"),
        (5, "--config.model.remat=lite"),
        (4.5, "--config.mesh.fsdp=4"),
    ]


@pytest.mark.parametrize("change", [{}, {"accumulation_steps": 4}, {"global_batch_size": 256}])
@pytest.mark.parametrize("memory_option", ["--config.loss.form=blockwise", ""])
@pytest.mark.parametrize("part", ["loss", "vision tower"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:1x1", "v5e:16x16", "v5p:4x4x12", "v3:2x2", "v4:4x4x16"])
def test_advice_is_in_order_and_its_options_go_together_with_the_config(config, change, memory_option, part, topology):
    config = searching.with_values(config, global_batch_size=6_144)
    config = searching.with_values(config, **change)
    mesh = {"mesh": {"data": 1, "fsdp": 1}} if topology == "v5e:1x1" else {}
    loss = {"loss": {"form": "gather", "memory_option": memory_option}}
    lines = advised(config, too_large(part=part) | mesh | loss, topology)
    assert lines == sorted(lines, key=lambda line: -line[0]) and lines[0][0] > 0
    options = dict(line[1].split("=") for line in lines)
    for name, value in options.items():
        if name.startswith("--config."):
            override(config.copy_and_resolve_references(), name.removeprefix("--config."), value)
    if "--topology" in options:
        assert parse_topology(options["--topology"]).chips >= parse_topology(topology).chips
    assert ("--config.loss.form" in options) == (part == "loss" and memory_option != "")


def test_advice_does_without_what_the_compiler_did_not_say(config):
    unknown = too_large() | {"out_of_memory": parse_out_of_memory("RESOURCE_EXHAUSTED"), "largest": []}
    assert (19, "--config.model.remat=full") in advised(config, unknown)
