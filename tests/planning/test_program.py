"""What is read from recorded programs: flops, cycles, collectives and loops.

``product_*.txt.gz`` are the programs of ``record.py``. ``train_step_v5e.txt.gz`` is a training step of an earlier
version for v5e:2x2, data 2 x fsdp 2, remat full, of 3 vision layers of width 128 over 17 tokens and 2 text layers of
width 128 over 24, batch 256, without what is not read.
"""

import collections
import gzip
import pathlib

import pytest

from clip_jax.planning.hlo import parse_module, trip_count
from clip_jax.planning.model_flops import loss_flops
from clip_jax.planning.program import direction_of, label_of, part_of, read_program
from clip_jax.planning.topologies import GENERATIONS

RECORDED = pathlib.Path(__file__).parent


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
