"""Writes the products that ``test_program.py`` reads, by the installed libtpu: python tests/planning/record.py

``product_*.txt.gz`` is a bfloat16 product of two 8,192 x 8,192 matrices for a generation. Needs ``[tpu]``, and no TPU.
"""

import gzip
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp

from clip_jax.planning import compiled
from clip_jax.planning.topologies import GENERATIONS, parse_topology

HERE = pathlib.Path(__file__).parent


def write(name: str, program: str) -> None:
    """Of each operation's metadata and configuration only what the planner reads: the name and the cycles."""
    program = re.sub(r" (stack_frame_id=\d+|deduplicated_name=\"[^\"]*\")", "", program)
    program = re.sub(r",? frontend_attributes=\{[^{}]*\}", "", program)
    program = re.sub(r"backend_config=\{.*?(\"estimated_cycles\":\"\d+\").*", r"backend_config={\1}", program)
    program = re.sub(r", backend_config=\{(?!\"estimated_cycles\").*", "", program)
    (HERE / f"{name}.txt.gz").write_bytes(gzip.compress(program.encode(), mtime=0))


def product(generation: str) -> str:
    topology = parse_topology(f"{generation}:{'x'.join(('2', '2', '1')[: GENERATIONS[generation].axes])}")
    sharding = jax.sharding.SingleDeviceSharding(compiled.slice_devices(topology)[0])
    matrix = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=sharding)
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        jax.jit(lambda a, b: a @ b).lower(matrix, matrix).compile(compiler_options=options)
        (file,) = pathlib.Path(dump).glob("*.after_codegen.txt")
        return file.read_text()


if __name__ == "__main__":
    os.environ.update(compiled.ENVIRONMENT)
    for generation in GENERATIONS:
        write(f"product_{generation}", product(generation))
