"""The compiler's messages, and the activations that a step saves."""

import jax
import pytest

from clip_jax.config import default_config
from clip_jax.planning.compiled import kept_bytes, largest_buffers, parse_out_of_memory
from clip_jax.planning.topologies import GIB
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, configured_mesh, make_model


@pytest.mark.parametrize("model", [pytest.param("ViT-tiny", marks=pytest.mark.slow), "RN50"])
def test_what_the_towers_keep_falls_with_each_policy(model):
    """Traced for one device of this machine."""
    config = default_config(model)
    config.update({"global_batch_size": 8, "accumulation_steps": 2})
    config.model.text.num_layers = 2
    if model == "RN50":
        config.model.vision.stage_sizes = (4, 1, 1, 1)
    mesh = configured_mesh(config, jax.devices()[:1])
    state = abstract_state(make_model(config, mesh), make_optimizer(config.optimizer, 10), mesh)
    size, length = config.model.vision.image_size, config.model.text.context_length
    images, tokens = jax.ShapeDtypeStruct((8, size, size, 3), "uint8"), jax.ShapeDtypeStruct((8, length), "int32")
    kept = kept_bytes(config, mesh, state, {"image": images, "tokens": tokens})
    assert kept["none"] > kept["lite"] > kept["attention"] > kept["full"] > 0


def test_what_the_compiler_says_when_it_gives_up():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.35G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    )
    assert parse_out_of_memory(message) == {
        "needed_bytes": round(16.35 * GIB),
        "available_bytes": round(15.75 * GIB),
        "temporaries_only": True,
    }
    other = parse_out_of_memory("Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.")
    assert other["needed_bytes"] == round(20.5 * GIB) and not other["temporaries_only"]
    assert parse_out_of_memory("RESOURCE_EXHAUSTED")["needed_bytes"] is None


def test_the_largest_buffers_are_read_from_the_compilers_reports():
    usage = """Memory Space: default (color=0)
Total bytes: 73213865472 (68.19GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
   64.00GiB( 79%);   64.00GiB;            0;                2; bf16[1,17,128], 7×f32[65536,262144]
   65.50GiB( 81%);    1.50GiB;   2415919104;                1; bf16[65536,17,384]
   64.00GiB( 79%);   64.00GiB;            0;                2; bf16[1,17,128], 7×f32[65536,262144]
Memory Space: vmem (color=1)
   97.00GiB( 79%);   97.00GiB;            0;                1; bf16[2]
"""
    program = '  %a = f32[65536,262144]{1,0:T(8,128)} fusion(%b), metadata={op_name="jit(f)/jvp()/shard_map/exp"}\n'
    assert largest_buffers(usage, program) == [
        {"num_bytes": 64 * GIB, "shape": "f32[65536,262144]", "name": "loss forward"},
        {"num_bytes": 3 * GIB // 2, "shape": "bf16[65536,17,384]", "name": ""},
    ]
