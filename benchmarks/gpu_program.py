"""Analyzes the compiled training step and loss for a GPU, without a GPU: memory, bytes moved, kernels, minimum time.

python -m benchmarks.gpu_program [--only=step,loss] [--models=ViT-L/14,...] [--remat=none,lite] [--forms] [--kinds=N]

Compiles for one H200 with XLA's compiler (``pip install -e ".[cuda]"``, Linux). A kernel takes at least the time of its
bytes at the GPU's published bandwidth, and of its products at the published matrix rate. The sum over kernels is the
least time of a step. No program reaches this bound; it only serves to compare programs. Nothing is measured.
``--forms`` removes the choices for GPUs one after the other. Without a GPU the compiler cannot time kernels. Matrix
products are therefore cuBLAS's, and a convolution is counted by its bytes alone.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from clip_jax.config import default_config
from clip_jax.losses import default_section, make_loss
from clip_jax.models import attention, layers
from clip_jax.models.execution import REMAT_POLICIES
from clip_jax.planning.hlo import Computation, Instruction, parse_module
from clip_jax.planning.model_flops import step_flops
from clip_jax.planning.program import FREE, Walk
from clip_jax.sharding import batch_sharding, make_mesh, replicated
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_batch, abstract_state, make_model
from clip_jax.training.step import make_train_step

GIB = 2**30
# NVIDIA's figures for the H200 SXM; products in bfloat16 without sparsity.
BANDWIDTH = 4.8e12
MATRIX_RATES = {"bf16": 989e12, "f32": 494e12}  # by the operands' dtype; float32 as TF32
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150117941248
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
BATCH_SIZE = {"ViT-L/14": 256, "ViT-B/16": 1_024, "ViT-B/32": 1_024, "RN50": 1_024}


def one_product(x, kernel, bias, num_heads, which, execution):
    """Computes queries, keys and values by one product, unlike ``attention.into_heads_by_position``."""
    thirds = jnp.split(layers.matrix_product(x, kernel, execution) + bias, 3, axis=2)
    return tuple(thirds[i].reshape(*x.shape[:2], num_heads, -1) for i in which)


# Each removes one more of the choices for GPUs: a patch, or values of config.model.
FORMS: dict[str, Callable[[], contextlib.AbstractContextManager] | dict] = {
    "as chosen": {},
    "one product for queries, keys, values": lambda: mock.patch.object(
        attention, "into_heads_by_position", one_product
    ),
    "layout left to the compiler": lambda: mock.patch.object(layers, "row_major", lambda x: x),
    "layers scanned": {"scan_unroll": 1},
    "attention not fused": {"fused_attention": False},
}


@dataclasses.dataclass
class Kernels:
    """The kernels of one step; ``by_name`` has the least seconds of each kind of operation."""

    number: int = 0
    num_bytes: int = 0
    flops: int = 0
    by_name: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def least_seconds(self) -> float:
        return self.by_name.total()


class GPUWalk(Walk):
    """Counts kernels; matrix products and attention are calls of libraries."""

    def __init__(self, text: str):
        if " conditional(" in text:
            raise ValueError("the program has a conditional, whose kernels cannot be counted")
        super().__init__(parse_module(text))
        self.kernels = Kernels()
        self.run()

    def leaf(self, instruction: Instruction, computation: Computation, times: int, caller: str) -> int:
        if instruction.opcode in FREE:
            return 0
        workspaces = sum(shape.num_bytes for shape in instruction.shapes if shape.dtype in ("s8", "u8"))
        target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
        library = target[1] if target else ""
        num_bytes = self.hbm_bytes(instruction, computation) - (workspaces if library else 0)
        flops = library_flops(library, instruction, computation)
        self.kernels.number += times
        self.kernels.num_bytes += times * num_bytes
        self.kernels.flops += times * flops
        name = library or f"{instruction.opcode} of {(self.op_name(instruction) or caller).split('/')[-1]}"
        rate = MATRIX_RATES[computation[instruction.operands[0]].shapes[0].dtype] if flops else math.inf
        self.kernels.by_name[name] += times * max(num_bytes / BANDWIDTH, flops / rate)
        return 0


def library_flops(library: str, call: Instruction, computation: Computation) -> int:
    """Returns the flops of a cuBLAS product, or of cuDNN's attention: two products forward, five backward."""
    left = computation[call.operands[0]].shapes[0].sizes if call.operands else ()
    if "cublas" in library:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)[1]
        return (
            2 * math.prod(call.shapes[0].sizes) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
        )
    if "fmha" in library:
        keys = computation[call.operands[1]].shapes[0].sizes
        return (5 if "Backward" in library else 2) * 2 * math.prod(left) * keys[1]  # of [B, L, heads, D] each
    return 0


def hide_gpus() -> None:
    """Hides GPUs from the compiler: with one it would time kernels, and the figures would not be comparable."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    jax.config.update("jax_platforms", "cpu")


def gpu_mesh(num_gpus: int = 1) -> jax.sharding.Mesh:
    """Returns a mesh of GPUs of one host, which share one copy of the parameters."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{num_gpus}")
    return make_mesh(num_gpus, topology.devices)


def compile_for_gpu(function: jax.stages.Wrapped, *arguments) -> jax.stages.Compiled:
    lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def gibibytes(compiled: jax.stages.Compiled) -> float:
    """Returns the memory of arguments, whose buffers most results reuse, and temporaries."""
    memory = compiled.memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB


def compile_step(
    mesh: jax.sharding.Mesh, model_name: str, batch_size: int, remat: str, **settings
) -> tuple[jax.stages.Compiled, int]:
    """Returns the compiled step of ``clip_jax.main``, with ``settings`` of ``config.model``, and its model flops."""
    config = default_config(model_name)
    config.global_batch_size, config.model.remat = batch_size, remat
    config.model.update(settings)
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, 1_000)
    step = make_train_step(config, model, optimizer, mesh)
    compiled = compile_for_gpu(step, abstract_state(model, optimizer, mesh), abstract_batch(config, mesh))
    return compiled, sum(step_flops(model.preset, batch_size).values())


def compile_loss(mesh: jax.sharding.Mesh, pairs: int, form: str, block_size: int) -> jax.stages.Compiled:
    """Returns the compiled value and gradients of the loss alone, for embeddings of 768 numbers."""
    embeddings = jax.ShapeDtypeStruct((pairs, 768), jnp.float32, sharding=batch_sharding(mesh))
    scalars = {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))}
    section = default_section()
    section.update(form=form, block_size=block_size)
    loss = make_loss(section, mesh, pairs, "bfloat16")  # as in the default training
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return compile_for_gpu(function, embeddings, embeddings, scalars)


def function_of(compiled: jax.stages.Compiled) -> str:
    """Returns the text of the program without source locations."""
    return re.sub(
        r"stack_frame_id=\d+|fingerprint_before_lhs=\"\w+\"", "", compiled.as_text().partition("StackFrames")[2]
    )


def print_steps(mesh: jax.sharding.Mesh, arguments: argparse.Namespace) -> None:
    print("\n| model | pairs | remat | form | memory | moved | products | kernels | compiled in | least | share |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model in arguments.models.split(","):
        batch_size = arguments.batch_size or BATCH_SIZE[model]
        for remat in arguments.remat.split(","):
            settings: dict = {}
            program = ""
            with contextlib.ExitStack() as patches:
                for name, change in FORMS.items():
                    if isinstance(change, dict):
                        settings |= change
                    else:
                        patches.enter_context(change())
                    start = time.perf_counter()
                    compiled, flops = compile_step(mesh, model, batch_size, remat, **settings)
                    seconds = time.perf_counter() - start
                    before, program = program, function_of(compiled)
                    if program == before and callable(change):
                        raise AssertionError(f"{name}: the patch does not change the program")
                    kernels = GPUWalk(compiled.as_text()).kernels
                    print(
                        f"| {model} | {batch_size:,} | {remat} | {name} | {gibibytes(compiled):.1f} GiB "
                        f"| {kernels.num_bytes / 1e9:,.0f} GB | {kernels.flops / 1e12:.1f} TFLOP "
                        f"| {kernels.number:,} | {seconds:.0f} s | {kernels.least_seconds * 1e3:.0f} ms "
                        f"| {flops / MATRIX_RATES['bf16'] / kernels.least_seconds:.0%} |",
                        flush=True,
                    )
                    for kind, least in kernels.by_name.most_common(arguments.kinds):
                        print(f"    {least * 1e3:6.1f} ms {kind}")
                    if not arguments.forms:
                        break


def print_losses(mesh: jax.sharding.Mesh) -> None:
    print("\n| pairs | form | blocks of | memory | moved | products | kernels | least |")
    print("|---|---|---|---|---|---|---|---|")
    for pairs in (8_192, 32_768, 131_072):
        for form, block_size in (("gather", 0), *(("blockwise", size) for size in (1_024, 4_096, 8_192, 16_384))):
            compiled = compile_loss(mesh, pairs, form, block_size)
            kernels = GPUWalk(compiled.as_text()).kernels
            print(
                f"| {pairs:,} | {form} | {f'{block_size:,}' if block_size else '–'} | {gibibytes(compiled):.2f} GiB "
                f"| {kernels.num_bytes / 1e9:,.0f} GB | {kernels.flops / 1e12:.1f} TFLOP | {kernels.number:,} "
                f"| {kernels.least_seconds * 1e3:.1f} ms |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="step,loss")
    parser.add_argument("--models", default=",".join(BATCH_SIZE))
    parser.add_argument("--remat", default=",".join(REMAT_POLICIES))
    parser.add_argument("--batch-size", type=int, help="instead of each model's own")
    parser.add_argument("--forms", action="store_true", help="also without the choices for GPUs")
    parser.add_argument("--kinds", type=int, default=0, help="list this many kinds of operations, the slowest first")
    arguments = parser.parse_args()
    hide_gpus()
    mesh = gpu_mesh()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
    print(f"for one {mesh.devices.flat[0].device_kind}, not run; {versions}")
    if "step" in arguments.only:
        print_steps(mesh, arguments)
    if "loss" in arguments.only:
        print_losses(mesh)


if __name__ == "__main__":
    main()
