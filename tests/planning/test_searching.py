"""The search for the largest batch and for the fastest mesh, with a stand-in for the compiler."""

import pytest
from plans import facts

from clip_jax.config import default_config
from clip_jax.planning import compiling, searching
from clip_jax.planning.topologies import GIB, parse_topology


def compiler_with(bytes_a_pair, step_seconds=lambda config: 1.0, available=16 * GIB):
    """A stand-in: what fits is what a chip's memory holds; counts its calls."""
    tried = []

    def compile_one(config):
        tried.append((config.global_batch_size, config.mesh.fsdp, config.model.remat))
        state = 9 * GIB // config.mesh.fsdp
        less = 4 if config.model.remat == "full" else 1
        used = config.global_batch_size // 4 * bytes_a_pair // less
        shards = {"parameters": state // 3, "optimizer state": state * 2 // 3, "running averages": 0, "batch": 0}
        if used + state > available:
            out = {"needed_bytes": used, "available_bytes": available, "temporaries_only": True}
            return facts(fits=False, shard_bytes=shards, out_of_memory=out, largest=[], kept_bytes={})
        memory = {"arguments": state, "results": 0, "in place": 0, "temporaries": used, "program": 0}
        program = facts()["program"] | {
            "cycles": [["loss", "", "other", "a", round(1.5e9 * step_seconds(config))]],
            "collectives": [],
        }
        return facts(shard_bytes=shards, memory=memory, program=program)

    return compile_one, tried


@pytest.mark.parametrize("start", [32, 4_096, 262_144])
@pytest.mark.parametrize("bytes_a_pair", [2**20, 5 * 2**20, 200 * 2**20])
def test_the_search_for_a_batch_ends_near_the_limit(config, start, bytes_a_pair):
    config.global_batch_size, config.mesh.fsdp = start, 2
    topology = parse_topology("v5e:2x2")
    compile_one, tried = compiler_with(bytes_a_pair)
    best = searching.largest_batch(config, topology, compile_one)
    limit = int((16 * GIB - 4.5 * GIB) / bytes_a_pair) * 4
    assert limit - max(32, limit / 16) - 32 <= best.global_batch_size <= limit
    assert best.global_batch_size % 32 == 0
    assert len(tried) <= 10
    assert config.global_batch_size == start


def test_a_batch_that_never_fits_is_said_to(config):
    config.mesh.fsdp = 1
    compile_one, _ = compiler_with(4 * GIB)
    with pytest.raises(compiling.PlanError, match="not even 32 pairs"):
        searching.largest_batch(config, parse_topology("v5e:2x2"), compile_one)


def test_the_search_for_a_mesh_goes_through_what_fits_while_it_gets_faster(config):
    def seconds(config):
        return (1.3 if config.model.remat == "full" else 1.0) + 0.1 * config.mesh.fsdp

    config.global_batch_size = 4_096
    compile_one, _ = compiler_with(10 * 2**20, seconds)
    tried = list(searching.meshes_and_remats(config, parse_topology("v5e:2x2"), compile_one))
    fitting = [(one.model.remat, one.mesh.fsdp) for one, report in tried if report["fits"]]
    assert ("none", 2) in fitting and ("none", 1) not in fitting
    assert {remat for remat, _ in fitting} >= {"none", "full"}


def test_a_batch_that_does_not_fit_is_cut_in_parts_that_should():
    config, topology = default_config("ViT-B/32"), parse_topology("v5e:2x2")
    state = {"parameters": 2 * GIB, "optimizer state": 2 * GIB, "batch": GIB // 100}
    for needed, parts in ((20, 2), (27, 4), (100, 16)):
        out = {"needed_bytes": needed * GIB, "available_bytes": 15 * GIB, "temporaries_only": False}
        facts = {"fits": False, "shard_bytes": state, "out_of_memory": out}
        assert searching.guess_parts(config, facts, topology) == parts
