"""The planner: what it reads from recorded programs and says of them, its mistakes, and, with libtpu, all of it.

``tests/planning`` holds programs that libtpu compiled: ``product_*.txt.gz`` are those of ``tests/planning/record.py``,
and ``train_step_v5e.txt.gz`` is a training step of an earlier version for v5e:2x2, data 2 x fsdp 2, remat full, of
3 vision layers of width 128 over 17 tokens and 2 text layers of width 128 over 24, batch 256, without what isn't read.
"""

import collections
import gzip
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import default_config, override
from clip_jax.models.clip import CLIP
from clip_jax.models.presets import PRESETS, CLIPPreset
from clip_jax.models.towers.resnet import ResNetPreset
from clip_jax.models.towers.text_transformer import TextTransformerPreset
from clip_jax.plan import main
from clip_jax.planning import compiling, figures, searching
from clip_jax.planning.accelerator_types import ACCELERATOR_TYPES
from clip_jax.planning.advice import advice
from clip_jax.planning.compiled import kept_bytes, largest_buffers, parse_out_of_memory
from clip_jax.planning.hlo import convolution_flops, parse_module, parse_shapes, trip_count
from clip_jax.planning.model_flops import loss_flops, step_flops, tower_flops
from clip_jax.planning.program import direction_of, label_of, part_of, read_program
from clip_jax.planning.report import format_report, make_report
from clip_jax.planning.topologies import GENERATIONS, GIB, parse_topology
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, configured_mesh, make_model

RECORDED = pathlib.Path(__file__).parent / "planning"


def recorded(name: str) -> str:
    return gzip.decompress((RECORDED / f"{name}.txt.gz").read_bytes()).decode()


@pytest.fixture(scope="module")
def step():
    return read_program(recorded("train_step_v5e"))


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_predicted_time_of_a_large_product_is_the_stated_share_of_the_peak(name):
    generation, program = GENERATIONS[name], read_program(recorded(f"product_{name}"))
    assert program.matmul_flops == 2 * 8192**3
    assert program.hbm_bytes == 3 * 2 * 8192**2
    seconds = sum(program.cycles.values()) / generation.clock
    share = program.matmul_flops / seconds / generation.peak_flops
    assert share == pytest.approx(generation.matmul_share, abs=0.006)
    assert not program.collectives and not program.not_counted


def test_a_recorded_step_has_the_flops_of_the_formula_and_of_recomputing_its_layers(step):
    """64 pairs a chip; when it was recorded, all positions of the last layers were computed."""
    layers = 64 * sum(
        number * (2 * tokens * 12 * 128**2 + 4 * tokens**2 * 128) for number, tokens in ((3, 17), (2, 24))
    )
    patches, projections, loss = 2 * 64 * 16 * 3 * 16**2 * 128, 2 * 2 * 64 * 128 * 128, loss_flops(256, 128) // 4
    last_products = 2 * 64 * 4 * 128**2 * (3 * 17 + 2 * 24)  # fc2's results, which the backward pass doesn't need
    flops = 2 * patches + 3 * (layers + projections) + loss + layers - last_products
    assert step.matmul_flops == pytest.approx(flops, rel=0.01)


def test_a_recorded_steps_loops_run_as_often_as_it_has_layers(step):
    module = parse_module(recorded("train_step_v5e"))
    entry = module.computations[module.entry]
    loops = [one for one in entry.values() if one.opcode == "while"]
    trips = {("image" in one.op_name, direction_of(one.op_name)): trip_count(module, entry, one) for one in loops}
    assert trips == {
        (True, "forward"): 3,
        (True, "backward"): 3,
        (False, "forward"): 2,
        (False, "backward"): 2,
    }
    assert step.unknown_loops == 0
    assert step.is_scheduled


def test_a_recorded_steps_cycles_are_told_by_part_and_pass(step):
    by_part, by_direction = collections.Counter(), collections.Counter()
    for (part, direction, _, _), cycles in step.cycles.items():
        by_part[part] += cycles
        by_direction[direction] += cycles
    assert sum(step.cycles.values()) == 3_286_598
    assert by_part.most_common(1)[0][0] == "vision tower"
    assert {"vision tower", "text tower", "loss", "optimizer"} <= by_part.keys()
    assert by_direction["backward"] > by_direction["forward"] > by_direction["recomputed"] > 0


def test_a_recorded_steps_collectives(step):
    counts = collections.Counter()
    for one in step.collectives:
        counts[one.kind, one.asynchronous, one.group_size] += one.times
    assert counts == {
        ("all-gather", False, 2): 26,
        ("all-gather", True, 2): 25,
        ("all-gather", False, 4): 2,
        ("all-reduce", False, 2): 29,
        ("all-reduce", False, 4): 15,
        ("reduce-scatter", False, 2): 6,
        ("reduce-scatter", False, 4): 1,
        ("all-to-all", False, 2): 1,
    }
    texts = [one for one in step.collectives if one.kind == "all-gather" and "shard_map" in one.op_name]
    assert max(one.num_bytes for one in texts) == 256 * 128 * 4  # all texts' embeddings, float32
    assert all(one.overlapped_cycles > 0 for one in step.collectives if one.asynchronous)
    assert not any(one.overlapped_cycles for one in step.collectives if not one.asynchronous)


LOOP = """HloModule f, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[16]{0:T(128)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %two)
  %start = ((f32[16]{0}), f32[128]{0}, u32[]) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %work = f32[16]{0:T(128)} fusion(%x), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/jvp(CLIP)/vision/a/mul"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %done = f32[128]{0} all-gather-done(%start)
  %after = f32[16]{0:T(128)} copy(%work), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %t = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%next, %after)
}

%inner (q: f32[16]) -> f32[16] {
  %q = f32[16]{0} parameter(0)
  ROOT %m = f32[16]{0} multiply(%q, %q)
}

%condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(COMPARED), direction=DIRECTION
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0:T(128)} parameter(0)
  %zero = s32[]{:T(128)} constant(START)
  %state = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[16]{0:T(128)}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[16]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def loop(start=0, step=1, compared="%i, %n", direction="LT"):
    text = LOOP.replace("STEP", str(step)).replace("START", str(start))
    return text.replace("COMPARED", compared).replace("DIRECTION", direction)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(), 10),
        (loop(start=3), 7),
        (loop(step=4), 3),
        (loop(direction="LE"), 11),
        (loop(compared="%n, %i", direction="GT"), 10),
        (loop(start=12), 0),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(text, trips):
    program = read_program(text)
    assert sum(program.cycles.values()) == 107 * trips
    assert [one.times for one in program.collectives] == [trips]
    assert program.unknown_loops == 0


def test_a_loop_that_does_not_count_is_said_to_be_unknown():
    program = read_program(loop(compared="%i, %i"))
    assert program.unknown_loops == 1
    assert sum(program.cycles.values()) == 107


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], device_ids=([2,2,2]T(1,0,2)) {'axis_0','axis_2'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_a_collectives_groups_are_read_in_each_form_that_the_compiler_writes(groups, size):
    (one,) = read_program(loop().replace("[1,8]<=[8]", groups)).collectives
    assert one.group_size == size


def test_groups_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="form that is not known: replica_groups=ring"):
        read_program(loop().replace("[1,8]<=[8]", "ring(8)"))


def test_quotes_that_the_compiler_escapes_are_plain_in_a_name():
    text = loop().replace("jit(f)/jvp(CLIP)/vision/a/mul", "state.params[\\'x\\'] \\\"y\\\"")
    module = parse_module(text)
    assert module.computations["body"]["work"].op_name == "state.params['x'] \"y\""


def test_an_asynchronous_collective_overlaps_what_stands_between_its_start_and_its_end():
    (one,) = read_program(loop()).collectives
    assert (one.kind, one.asynchronous, one.overlapped_cycles) == ("all-gather", True, 100)
    assert (one.num_bytes, one.group_size, one.received_bytes) == (512, 8, 448)


def test_an_asynchronous_collective_in_the_general_form_is_followed_through_its_updates():
    text = loop().replace(
        "all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}", "async-start(%x), calls=%wrapped"
    )
    text = text.replace("all-gather-done(%start)", "async-done(%update)")
    text = text.replace("  %work =", "  %update = ((f32[16]{0}), f32[128]{0}, u32[]) async-update(%start)\n  %work =")
    text += """
%wrapped (w: f32[16]) -> f32[128] {
  %w = f32[16]{0} parameter(0)
  ROOT %g = f32[128]{0} all-gather(%w), replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""
    (one,) = read_program(text).collectives
    assert (one.kind, one.asynchronous, one.overlapped_cycles, one.group_size) == ("all-gather", True, 100, 2)


def test_shapes_and_where_they_live():
    array, inner = parse_shapes("(bf16[3,8]{1,0:T(8,128)(2,1)}, s4[10]{0:T(128)S(1)})")
    assert (array.sizes, array.num_bytes, array.in_hbm) == ((3, 8), 48, True)
    assert (inner.num_bytes, inner.in_hbm) == (5, False)


@pytest.mark.parametrize(
    ("left", "right", "dimensions", "strides", "padding", "left_dilation"),
    [
        ((2, 9, 9, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (2, 2), [(1, 1)] * 2, (1, 1)),
        ((2, 8, 8, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (1, 1), [(1, 1)] * 2, (1, 1)),
        ((2, 5, 5, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), (1, 1), [(2, 1)] * 2, (2, 2)),
        ((4, 6, 6, 8), (4, 6, 6, 5), ("FHWN", "IHWO", "NHWF"), (1, 1), [(0, 0)] * 2, (1, 1)),
    ],
)
def test_the_flops_of_a_convolution_leave_out_padding_and_holes(
    left, right, dimensions, strides, padding, left_dilation
):
    """Counted by convolving ones with ones: each multiply-add adds 1."""
    if dimensions[0] == "FHWN":
        left, right, dimensions = (8, 6, 6, 4), (4, 6, 6, 5), ("NHWC", "IHWO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, lhs_dilation=left_dilation, dimension_numbers=dimensions
        )

    ones = jnp.ones(left), jnp.ones(right)
    text = jax.jit(convolve).lower(*ones).as_text(dialect="hlo")
    module = parse_module(text)
    computation = module.computations[module.entry]
    found = next(one for one in computation.values() if one.opcode == "convolution")
    assert convolution_flops(computation, found) == 2 * int(convolve(*ones).sum())


def jaxpr_flops(jaxpr) -> int:
    """Of all products and convolutions, as jax writes them."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [jaxpr_flops(one) for one in jax.extend.core.jaxprs_in_params(equation.params)]
        name = equation.primitive.name
        if name == "cond":  # of a platform's branches, alike but for a product's own sums on a TPU
            total += min(inner)
        else:
            total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize("name", ["ViT-tiny", "ViT-B/32", "ViT-L/14@336"])
def test_the_model_flops_of_a_vision_transformer_are_those_of_its_gradient(name):
    preset = PRESETS[name]
    size, length = preset.vision.image_size, preset.text.context_length
    images, tokens = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    model = CLIP(preset)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    jaxpr = jax.make_jaxpr(jax.grad(lambda variables, *batch: sum(x.sum() for x in model.apply(variables, *batch))))
    counted = jaxpr_flops(jaxpr(variables, images, tokens).jaxpr)
    # The gradient of attention computes the scores once more, which nothing forces it to.
    towers = ((preset.vision, (size // preset.vision.patch_size) ** 2 + 1), (preset.text, length))
    scores = sum(2 * tokens * tower.width * ((tower.num_layers - 1) * tokens + 1) for tower, tokens in towers)
    assert sum(tower_flops(preset).values()) == counted - scores


def test_the_model_flops_of_a_resnet_are_those_that_xla_counts():
    preset = CLIPPreset(24, ResNetPreset(64, 8, (2, 1, 1, 2), 4), TextTransformerPreset(8, 1, 1, 4, 16))
    model = CLIP(preset)
    images, tokens = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
    text = (
        jax.jit(lambda v, x: model.apply(v, x, method="encode_image")).lower(variables, images).as_text(dialect="hlo")
    )
    module = parse_module(text)
    counted = sum(
        convolution_flops(computation, one)
        for computation in module.computations.values()
        for one in computation.values()
        if one.opcode in ("convolution", "dot")
    )
    first = 2 * 3 * 4 * sum(sum(0 <= 2 * o + k - 1 < 64 for k in range(3)) for o in range(32)) ** 2
    forward = (tower_flops(preset)["vision tower"] + first) / 3
    assert counted == pytest.approx(forward, rel=0.02)


def test_the_flops_of_the_forward_pass_are_those_that_open_clip_publishes():
    """Billions for a pair, in its docs/model_profile.csv, which counts all positions of the last layer as well."""
    for name, billions in (("ViT-B/32", 14.78), ("ViT-B/16", 41.09), ("ViT-L/14", 175.33)):
        preset = PRESETS[name]
        towers = ((preset.vision, (224 // preset.vision.patch_size) ** 2), (preset.text, 76))
        others = sum(
            2 * positions * tower.width * (10 * tower.width + 2 * (positions + 1)) for tower, positions in towers
        )
        forward = sum(tower_flops(preset).values()) / 3 + others
        assert forward / 1e9 == pytest.approx(billions, rel=0.02)
    assert loss_flops(32_768, 768) == 6 * 32_768**2 * 768


@pytest.mark.parametrize(
    ("op_name", "part", "direction", "label"),
    [
        (
            "jit(train_step)/jvp(CLIP)/CLIP.encode_image/vision/transformer/while/body/closed_call/blocks/fc1/dot_general",
            "vision tower",
            "forward",
            "blocks/fc1/dot_general",
        ),
        (
            "jit(train_step)/transpose(jvp(CLIP))/CLIP.encode_text/text/transformer/while/body/closed_call/checkpoint/"
            "rematted_computation/blocks/qkv/cond/branch_0_fun/dot_general",
            "text tower",
            "recomputed",
            "blocks/qkv/dot_general",
        ),
        ("jit(train_step)/transpose(jvp())/shard_map/mul", "loss", "backward", "shard_map/mul"),
        ("jit(train_step)/mul", "optimizer", "", "mul"),
        ("state.params['text']['token_embedding']", "optimizer", "", "state.params/token_embedding"),
        ("", "other", "", "(unnamed)"),
    ],
)
def test_an_operations_name_says_where_it_belongs(op_name, part, direction, label):
    assert (part_of(op_name), direction_of(op_name), label_of(op_name)) == (part, direction, label)


@pytest.fixture
def config():
    config = default_config("ViT-B/32")
    config.data.source = "none"
    return config


def facts(**changes):
    cycles = [
        ["vision tower", "forward", "matrix products", "fc1", 1_200_000_000],
        ["loss", "forward", "elementwise, reductions and copies", "exp", 300_000_000],
    ]
    hidden = {
        "kind": "all-gather",
        "num_bytes": 2_000_000_000,
        "received_bytes": 1_000_000_000,
        "group_size": 2,
        "times": 3,
        "asynchronous": True,
        "op_name": "",
        "overlapped_cycles": 6_000_000,  # 4 ms of the 5 that it takes on v5e
    }
    open_one = hidden | {"kind": "all-reduce", "times": 1, "asynchronous": False, "overlapped_cycles": 0}
    return {
        "loss": {"form": "gather", "memory_option": "--config.loss.form=blockwise"},
        "mesh": {"data": 2, "fsdp": 2},
        "num_parameters": 151_277_313,
        "shard_bytes": {"parameters": 3 * GIB, "optimizer state": 6 * GIB, "running averages": 0, "batch": GIB},
        "versions": {"jax": "1", "jaxlib": "1", "libtpu": "1"},
        "fits": True,
        "memory": {
            "arguments": 11 * GIB,
            "results": 9 * GIB,
            "in place": 9 * GIB,
            "temporaries": 2 * GIB,
            "program": GIB,
        },
        "program": {
            "cycles": cycles,
            "matmul_flops": 10**12,
            "hbm_bytes": 819 * 10**9,
            "collectives": [hidden, open_one],
            "not_counted": {"sort of a/scatter-add": 2, "fusion of text/gather": 1},
            "unknown_loops": 0,
            "is_scheduled": True,
        },
    } | changes


def too_large(temporaries_only=True, part="vision tower"):
    return facts(
        fits=False,
        out_of_memory={
            "needed_bytes": 30 * GIB,
            "available_bytes": 15 * GIB,
            "temporaries_only": temporaries_only,
        },
        largest=[{"num_bytes": 5 * GIB, "shape": "f32[2,3]", "name": f"{part} forward"}],
        kept_bytes={"none": 20 * GIB, "lite": 15 * GIB, "attention": 9 * GIB, "full": GIB},
    )


def test_a_reports_arithmetic(config):
    config.global_batch_size, config.epochs = 1_000, 2.0
    report = make_report(config, parse_topology("v5e:2x2"), facts(), pairs=1_000_000, chip_hour_price=1.5)
    assert report["seconds"] == pytest.approx({"compute": 1.0, "collectives_at_least": 0.008, "step": 1.008})
    assert report["memory"] == {
        "parameters": 3 * GIB,
        "optimizer state": 6 * GIB,
        "batch": GIB,
        "padding": GIB,
        "results not in place": 0,
        "temporaries": 2 * GIB,
        "program": GIB,
        "all": 14 * GIB,
    }
    gather, reduce = report["collectives"]
    assert (gather["kind"], gather["count"], gather["overlapping"]) == ("all-gather", 3, 3)
    assert gather["seconds_at_least"] == pytest.approx(0.015) and gather["exposed_seconds"] == pytest.approx(0.003)
    assert reduce["exposed_seconds"] == pytest.approx(0.005)
    assert report["bytes_accessed_seconds"] == pytest.approx(1)
    assert report["seconds_by_part"] == pytest.approx({"vision tower": 0.8, "loss": 0.2})
    assert report["steps"] == 2_000
    assert report["days"] == pytest.approx(2_000 * 1.008 / 86_400)
    assert report["cost"] == pytest.approx(2_000 * 1.008 / 3600 * 4 * 1.5)
    assert report["pairs_per_second"] == pytest.approx(1_000 / 1.008)
    needed = report["model_flops"]["all"]
    assert needed * 4 == sum(step_flops(PRESETS["ViT-B/32"], 1_000).values())
    assert report["model_flops_utilization"] == pytest.approx(needed / 1.008 / 197e12)
    assert report["compiled_to_model_flops"] == pytest.approx(1e12 / needed)
    json.dumps(report)


def test_the_configs_steps_are_the_run_if_it_names_them(config):
    config.steps = 7
    report = make_report(config, parse_topology("v5e:2x2"), facts())
    assert (report["steps"], report["pairs"]) == (7, None)
    assert any("7 steps, " in line for line in format_report(report))


def test_steps_of_smaller_images_are_said_not_to_be_in_the_prediction(config):
    config.progressive_resolution.update(image_size=112, steps=1_000)
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), facts())))
    assert "the first 1,000 steps, of smaller images, take less" in text


def test_a_printed_report_says_what_it_stands_on(config):
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), facts(), chip_hour_price=1)))
    for part in ("It fits: 14.00 GiB of 16.00 GiB", "400,000,000 pairs, the paper's number", "prediction", "cost"):
        assert part in text
    assert "scatter" not in text and "sort (2 times)" in text and "gather (1 times)" in text


def test_what_does_not_fit_comes_with_the_largest_things_and_what_to_change(config):
    text = "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), too_large())))
    assert "does not fit: temporaries alone need 30.00 GiB of the 15.00 GiB" in text
    assert "f32[2,3]" in text
    config.model.remat = "full"
    assert "remat=" not in "\n".join(format_report(make_report(config, parse_topology("v5e:2x2"), too_large(False))))


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


@pytest.mark.parametrize("model", ["ViT-tiny", "RN50"])
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


def test_advice_does_without_what_the_compiler_did_not_say(config):
    unknown = too_large() | {"out_of_memory": parse_out_of_memory("RESOURCE_EXHAUSTED"), "largest": []}
    assert (19, "--config.model.remat=full") in advised(config, unknown)


def test_figures_keep_digits_that_are_not_zero(config):
    assert figures.num_bytes(0) == "0 B" and figures.num_bytes(96) == "96 B" and figures.num_bytes(3_000) == "2.93 KiB"
    assert figures.seconds(3.2e-9) == "3.20 ns" and figures.seconds(0.914) == "0.914 s"
    assert figures.share(2.8, 10_000) == "0.028%" and figures.share(1, 0) == "-"
    assert figures.span(2.4) == "2.40 seconds" and figures.span(86_400 * 4.128) == "4.13 days"
    assert figures.number(0.00123, 2) == "0.0012" and figures.flops(41_153_000) == "41.153 M"
    for power in range(-15, 16):
        for show in (figures.seconds, figures.span, figures.flops, figures.number, lambda one: figures.share(one, 1)):
            assert re.search("[1-9]", show(1.04 * 10.0**power)), power
        if power >= 0:
            assert re.search("[1-9]", figures.num_bytes(10**power))


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:4x4x4", "v3:2x2"])
def test_a_report_of_a_tiny_step_prints_no_figure_as_zero(config, topology):
    """All but those that are zero; a collective of 4 bytes, a step of 8 pairs, a price of a millionth."""
    config = searching.with_values(config, global_batch_size=8 * parse_topology(topology).devices, steps=1)
    small = {"received_bytes": 4, "num_bytes": 4, "times": 1, "kind": "all-reduce", "asynchronous": False}
    program = facts()["program"] | {
        "cycles": [["loss", "forward", "matrix products", "exp", 1_000_000], ["loss", "", "other", "a", 1]],
        "collectives": [small | {"overlapped_cycles": 0, "group_size": 2, "op_name": ""}],
        "matmul_flops": 100,
        "hbm_bytes": 900,
    }
    memory = facts()["memory"] | {"temporaries": 3, "program": 1_200}
    report = make_report(config, parse_topology(topology), facts(program=program, memory=memory), chip_hour_price=1e-6)
    text = "\n".join(format_report(report))
    assert not re.search(r"(?<![\d.,])0(\.0+)?(?= *(%|[KMG]iB|s|ms|us|T|days|hours|pairs/s)\b|%)", text), text
    assert "'" not in text.replace("model's", "").replace("compiler's", "").replace("config's", "").replace(
        "paper's", ""
    ).replace("program's", "")
    assert f"on {topology} ({parse_topology(topology).accelerator_type})" in text


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


COMMAND = ["--config=configs/vit_b32.py", "--topology=v5e:2x2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v7:2x2"], "v2:AxB, v3:AxB, v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB"),
        (["--topology=v5litepod-12"], "of 12 chips; the nearest are v5litepod-8 (2x4) and v5litepod-16 (4x4)"),
        (["--topology=v5p-100"], "100 TensorCores, two on each chip; the nearest are v5p-64 (2x4x4) and v5p-128"),
        (["--topology=v6e-512"], "the nearest are v6e-256 (16x16)"),
        (["--topology=v5p-0"], "the nearest are v5p-8 (2x2x1)"),
        (["--topology=v3-33"], "the nearest are v3-32 (4x4) and v3-64 (4x8)"),
        (["--topology=V5P-128"], "did you mean v5p-128?"),
        (["--topology=v5litepod16"], "did you mean v5litepod-16?"),
        (["--topology=v5lite-16"], "did you mean v5litepod-16 or"),
        (["--topology=TPU v4-32"], "did you mean v4-32?"),
        (["--topology=v5e:16*16"], "did you mean v5e:16x16?"),
        (["--topology=v5p:8X8X4"], "did you mean v5p:8x8x4?"),
        (["--topology=4x4x4"], "did you mean v4:4x4x4 or v5p:4x4x4?"),
        (["--topology="], "no such slice. Slices are written"),
        (["--topology"], "argument --topology: expected one argument"),
        (["--topology=v5e:4x4x4"], "no such slice"),
        (["--topology=v5e:0x4"], "no such slice"),
        (["--chips=3"], "unknown argument --chips=3"),
        (["--config.mesh.fdsp=2"], "did you mean --config.mesh.fsdp"),
        (["--pairs=0"], "--pairs=0 must be positive"),
        (["--chip-hour-price=-1"], "--chip-hour-price"),
        (["--search=everything"], "--search"),
        (["--config.global_batch_size=1"], "must be at least 2"),
    ],
)
def test_a_mistake_is_told_in_a_line(capsys, arguments, message):
    assert main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert main(COMMAND) == 2
    assert 'pip install "clip-jax-tpu[tpu]"' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], COMMAND[:1], COMMAND[1:]])
def test_a_flag_that_is_missing_is_told_in_a_line(capsys, arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "required" in error and error.count("\n") == 1


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


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "noise\nERROR: Unknown command line flag 'xla_foo'\n",
            "LIBTPU_INIT_ARGS holds: Unknown command line flag 'xla_foo'",
        ),
        ("F0 1 parse.cc:2] Unknown flags in XLA_FLAGS: --xla_foo=1 \n", "XLA_FLAGS holds: --xla_foo=1"),
        ("Traceback\n  File x\nTypeError: no\n--------\nFor simplicity\n", "exit code 1: TypeError: no"),
        ("", "it said nothing"),
    ],
)
def test_a_compiler_that_ends_is_told_in_a_line(log, message):
    reason = compiling.why_it_ended(log, 1)
    assert message in reason and "\n" not in reason


def test_what_was_compiled_once_is_known(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: True)
    asked = []
    monkeypatch.setattr(compiling, "_ask_child", lambda *arguments: asked.append(1) or facts())
    topology = parse_topology("v5e:2x2")
    for change in ({}, {}, {"seed": 5}, {"data__source": "x"}, {"model__remat": "full"}, {"global_batch_size": 64}):
        assert compiling.compile_facts(searching.with_values(config, **change), topology) == facts()
    assert len(asked) == 3  # neither the data nor the seed is compiled
    compiling.compile_facts(config, parse_topology("v5e:4x4"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something")
    compiling.compile_facts(config, topology)
    assert len(asked) == 5


def test_what_was_compiled_is_known_again_after_a_change_of_words_and_not_after_one_of_the_program():
    program = 'def f(x):\n    """Doubles."""\n    return 2 * x\n'
    reworded = 'def f(x):  # not more\n    """Twice as much."""\n    return 2 * x\n'
    assert compiling._without_words(program) == compiling._without_words(reworded)
    assert compiling._without_words(program) != compiling._without_words(program.replace("2", "3"))


def test_a_batch_that_does_not_fit_is_cut_in_parts_that_should():
    config, topology = default_config("ViT-B/32"), parse_topology("v5e:2x2")
    state = {"parameters": 2 * GIB, "optimizer state": 2 * GIB, "batch": GIB // 100}
    for needed, parts in ((20, 2), (27, 4), (100, 16)):
        out = {"needed_bytes": needed * GIB, "available_bytes": 15 * GIB, "temporaries_only": False}
        facts = {"fits": False, "shard_bytes": state, "out_of_memory": out}
        assert searching.guess_parts(config, facts, topology) == parts


SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.dtype=bfloat16",
    "--config.model.vision.num_layers=3",
    "--config.model.text.num_layers=3",
    "--config.model.scan_unroll=1",  # one layer by itself, or the compiler undoes the remat
    "--config.model.remat=full",
    "--config.mesh.fsdp=2",
]


@pytest.mark.parametrize("topology", ["v5litepod-4", "v5p:2x2x1"])
def test_a_small_config_is_compiled_for_two_generations(capsys, monkeypatch, tmp_path, topology):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*SMALL, f"--topology={topology}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["mesh"] == {"data": 2, "fsdp": 2}
    assert 1 < report["compiled_to_model_flops"] < 1.4
    assert report["memory"]["all"] < GIB
    assert report["memory"]["parameters"] == pytest.approx(report["num_parameters"] * 2, rel=0.05)
    assert 1e-5 < report["seconds"]["step"] < 1e-1
    assert report["unknown_loops"] == 0 and report["is_scheduled"]
    assert {"vision tower", "text tower", "loss", "optimizer"} <= report["seconds_by_part"].keys()
    assert {"all-gather", "all-reduce", "reduce-scatter"} <= {one["kind"] for one in report["collectives"]}
    assert np.isfinite(report["days"])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--topology=v5e:3x3"], {}, "near it are v5e:2x4 (v5litepod-8) and v5e:4x4 (v5litepod-16)"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], {}, "config.mesh.fsdp=3 does not divide the 4 devices"),
        (["--topology=v5e:2x2", "--config.global_batch_size=10"], {}, "8 or 12 can"),
        (["--topology=v5e:2x2"], {"LIBTPU_INIT_ARGS": "--xla_no_such=1"}, "flag 'xla_no_such'"),
    ],
)
def test_what_only_the_compiler_knows_is_told_in_a_line_too(
    capsys, monkeypatch, tmp_path, arguments, environment, message
):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_step_that_does_not_fit_names_the_largest_arrays(capsys, monkeypatch, tmp_path):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = ["--config.global_batch_size=262144", "--config.loss.form=gather"]
    assert main([*SMALL, "--topology=v5e:2x2", *batch]) == 1
    text = capsys.readouterr().out
    assert "It does not fit" in text and "f32[65536,262144]" in text and "--config.global_batch_size=" in text
    assert "--config.loss.form=blockwise" in text
