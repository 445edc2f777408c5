"""What is read off a GPU's program; and, where JAX's plugin for CUDA is, that it can be compiled without a GPU."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.gpu_program import BANDWIDTH, MATRIX_RATES, GPUWalk

REPOSITORY = pathlib.Path(__file__).parent.parent.parent

# tanh(x @ w) as queries, keys and values of 2 heads, causal, as jaxlib 0.10.2 compiled it for an H200; shortened.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_convert (param_0.2: bf16[128,16]) -> bf16[128,16] {
  %param_0.2 = bf16[128,16]{1,0} parameter(0)
  %convert.3 = f32[128,16]{1,0} convert(%param_0.2)
  %tanh.1.1 = f32[128,16]{1,0} tanh(%convert.3), metadata={op_name="jit(f)/tanh"}
  ROOT %convert.1.1 = bf16[128,16]{1,0} convert(%tanh.1.1)
}

ENTRY %main.1 (x.1: bf16[128,64], w.1: bf16[64,16]) -> bf16[4,32,2,8] {
  %w.1 = bf16[64,16]{1,0} parameter(1)
  %x.1 = bf16[128,64]{1,0} parameter(0)
  %custom-call.1 = (bf16[128,16]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %get-tuple-element.1 = bf16[128,16]{1,0} get-tuple-element(%custom-call.1), index=0
  %loop_convert_fusion = bf16[128,16]{1,0} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused_convert
  %bitcast.9 = bf16[4,32,2,8]{3,2,1,0} bitcast(%loop_convert_fusion)
  %fmha = (bf16[4,2,32,8]{3,1,2,0}, u8[0]{0}) custom-call(%bitcast.9, %bitcast.9, %bitcast.9), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/dot_product_attention_fwd"}, \
backend_config={"cudnn_fmha_backend_config": {"mask_type": "CAUSAL"}}
  %get-tuple-element.2 = bf16[4,2,32,8]{3,1,2,0} get-tuple-element(%fmha), index=0
  ROOT %bitcast.1.0 = bf16[4,32,2,8]{3,2,1,0} bitcast(%get-tuple-element.2)
}
"""


def test_kernels_take_the_time_of_their_bytes_or_of_their_products():
    kernels = GPUWalk(PROGRAM).kernels
    product, attention = 2 * 128 * 64 * 16, 2 * 2 * (4 * 2 * 32 * 32 * 8)
    moved = {
        "__cublas$lt$matmul": 2 * (128 * 64 + 64 * 16 + 128 * 16),
        "fusion of tanh": 2 * (2 * 128 * 16),
        "__cudnn$fmhaSoftmax": 2 * (4 * 128 * 16),
    }
    assert (kernels.number, kernels.flops, kernels.num_bytes) == (3, product + attention, sum(moved.values()))
    assert kernels.by_name == pytest.approx({name: size / BANDWIDTH for name, size in moved.items()})
    assert kernels.least_seconds == pytest.approx(sum(moved.values()) / BANDWIDTH)


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("f32", 4)])
def test_large_products_take_the_time_of_their_operands_matrix_rate(dtype, size):
    wide = PROGRAM.replace("128,64]", "131072,64]").replace("64,16]", "64,8192]").replace("128,16]", "131072,8192]")
    wide = wide.replace("bf16[", f"{dtype}[").replace("4,32,2,8]", "64,2048,128,64]").replace("4,2,32", "64,128,2048")
    seconds = GPUWalk(wide).kernels.by_name["__cublas$lt$matmul"]
    flops, num_bytes = 2 * 131_072 * 64 * 8_192, size * (131_072 * 64 + 64 * 8_192 + 131_072 * 8_192)
    assert seconds == pytest.approx(max(flops / MATRIX_RATES[dtype], num_bytes / BANDWIDTH))


needs_the_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13]: make test-cuda"
)


def run_alone(*arguments: str) -> str:
    """What a process prints that has no devices but a CPU."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_the_plugin
def test_a_step_is_compiled_for_a_gpu_that_is_not_there():
    options = ["--models=ViT-tiny", "--remat=lite", "--batch-size=64", "--only=step", "--forms", "--kinds=99"]
    printed = run_alone("-m", "benchmarks.gpu_program", *options)
    rows = [line for line in printed.splitlines() if line.startswith("| ViT-tiny")]
    assert len(rows) == 5
    assert "__cudnn$fmhaSoftmaxBackward" in printed.partition(rows[4])[0]
    assert "fmha" not in printed.partition(rows[4])[2]


EIGHT_GPUS = """
from benchmarks.gpu_program import compile_step, gpu_mesh, hide_gpus
hide_gpus()
sizes = {"image_size": 32, "patch_size": 16, "width": 128, "num_layers": 3, "num_heads": 2}  # 5 positions
compiled, _ = compile_step(gpu_mesh(8), "ViT-tiny", 80, "lite", vision=sizes)
print(compiled.as_text())
"""


@needs_the_plugin
def test_on_eight_gpus_each_attends_to_its_own_part_of_the_batch():
    """80 pairs, 10 of them on each: 50 positions of images and 240 of texts, which no parameter has as a size."""
    program = run_alone("-c", EIGHT_GPUS)
    attentions = [line for line in program.splitlines() if 'custom_call_target="__cudnn$fmha' in line]
    assert len(attentions) >= 4
    for line in attentions:
        shapes = re.findall(r"bf16\[(\d+),\d+,\d+,64\]", line)
        assert shapes and set(shapes) == {"10"}
        # The numbers of keys, where there are any, are those of the same images.
        assert set(re.findall(r"s32\[(\d+)\]", line)) <= {"10"}
    assert any("s32[10]" in line for line in attentions)
    gathered = re.findall(r"= (.*?) all-gather(?:-start)?\(", program)
    assert gathered
    for shapes in gathered:
        for sizes in re.findall(r"\[([\d,]+)\]", shapes):
            assert not re.match(r"80,\d+,\d+", sizes), shapes
