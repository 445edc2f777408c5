"""Compiles the training step for a TPU slice without a TPU, and reports its memory and its schedule.

Runs in its own process (:mod:`clip_jax.planning.compiling` starts it), because libtpu ends the process when it rejects
a flag. Reads ``{"config": ..., "topology": ...}`` as JSON from standard input and writes JSON to standard output:
``{"facts": ...}``, or ``{"error": one line}`` if there is a mistake in the request.
"""

import collections
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time

from clip_jax.errors import one_line
from clip_jax.planning.hlo import parse_shapes
from clip_jax.planning.program import direction_of, part_of, read_program
from clip_jax.planning.topologies import GIB, Topology, nearest_slices, parse_topology

# Must be set before libtpu is loaded: there is no TPU to query, and another program may be using libtpu.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def slice_devices(topology: Topology) -> list:
    """The devices of a slice, as the compiler describes them.

    Raises:
      ValueError: the compiler has no such slice, or sees another number of devices.
    """
    import jax
    from jax.experimental import topologies

    options: dict = {}
    if topology.generation.chip_config_name:
        options["chip_config_name"] = topology.generation.chip_config_name
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # one chip is not a multiple of the default, 2x2x1
    try:
        description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = one_line(error).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"--topology={topology.name}: the compiler has no such slice ({reason}); near it are "
            f"{nearest_slices(topology)}"
        ) from None
    devices = list(description.devices)
    if len(devices) != topology.devices:
        raise ValueError(
            f"--topology={topology.name}: the compiler sees {len(devices)} devices, not {topology.devices}"
        )
    return devices


def shard_bytes(tree) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    import jax

    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def parse_out_of_memory(message: str) -> dict:
    """The sizes in the compiler's out-of-memory message.

    Returns:
      ``needed_bytes`` and ``available_bytes``, None if the message does not state them; ``temporaries_only`` is True if
      ``needed_bytes`` does not include parameters and batch.
    """

    def size(number: str, unit: str) -> int:
        return round(float(number) * _UNITS[unit])

    temporaries = re.search(
        r"HLO temporaries \(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)", message
    )
    found = temporaries or re.search(r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)", message)
    return {
        "needed_bytes": size(found[1], found[2]) if found else None,
        "available_bytes": size(found[3], found[4]) if found else None,
        "temporaries_only": bool(temporaries),
    }


def largest_buffers(usage: str, program: str, most: int = 6) -> list[dict]:
    """The largest HBM buffers that the compiler planned, largest first: ``num_bytes``, ``shape``, ``name``.

    Args:
      usage: the compiler's memory usage report. Only its first memory space, HBM, is read. Several arrays may use one
        buffer at different times; ``shape`` is that of the largest.
      program: the compiler's program, to find where in the model an array of that shape comes from.
      most: how many buffers to return.
    """
    places: dict[tuple[int, int], str] = {}
    for line in usage.split("Memory Space: ")[1].splitlines():
        found = re.match(r"\s*[\d.]+\w+\(\s*\d+%\);\s+([\d.]+)([KMGT]?)i?B;\s+(\d+);\s+\d+; (.*)", line)
        if found:
            places.setdefault((round(float(found[1]) * _UNITS[found[2]]), int(found[3])), found[4])
    names: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for shape, name in re.findall(r" = (\w+\[[\d,]*\]).*?op_name=\"([^\"]*)\"", program):
        names[shape][" ".join(filter(None, (part_of(name), direction_of(name))))] += 1
    largest = []
    for (num_bytes, _), shapes in sorted(places.items(), reverse=True)[:most]:
        arrays = re.findall(r"\w+\[[\d,]*\]", shapes)
        shape = max(arrays, key=lambda array: sum(one.num_bytes for one in parse_shapes(array)), default="")
        common = names[shape].most_common(1) if shape in names else []
        largest.append({"num_bytes": num_bytes, "shape": shape, "name": common[0][0] if common else ""})
    return largest


def kept_bytes(config, mesh, state, batch: dict) -> dict[str, int]:
    """For each remat policy, the bytes on one device that the towers' forward pass keeps for the backward pass.

    Computed from the shapes that JAX saves, without compiling. For every policy they include the parameters that the
    backward pass needs. With ``accumulation_steps`` they are for one part of the batch.
    """
    import jax

    from clip_jax.models.execution import REMAT_POLICIES
    from clip_jax.training.state import make_model
    from clip_jax.training.step import embed

    def kept(remat: str) -> int:
        candidate = config.copy_and_resolve_references()
        candidate.model.remat = remat
        model = make_model(candidate, mesh)

        def backward(params, batch_stats, batch):
            return jax.vjp(lambda params: embed(model, params, batch_stats, batch)[0], params)[1]

        part = config.global_batch_size // config.accumulation_steps
        shapes = {
            name: jax.ShapeDtypeStruct((part, *batch[name].shape[1:]), batch[name].dtype)
            for name in ("image", "tokens")
        }
        saved = jax.eval_shape(backward, state.params, state.batch_stats, shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved)) // mesh.size

    return {remat: kept(remat) for remat in REMAT_POLICIES}


def compile_step(config_dict: dict, topology: Topology) -> dict:
    """Compiles the step that ``clip_jax.main`` runs with this config, and returns its memory, program and versions.

    Raises:
      ValueError: the slice, the mesh and the batch are not compatible.
    """
    import jax
    import jaxlib
    import ml_collections

    from clip_jax.losses import make_loss
    from clip_jax.sharding import check_batch_divides
    from clip_jax.training.optimizer import make_optimizer
    from clip_jax.training.state import abstract_batch, abstract_state, configured_mesh, make_model
    from clip_jax.training.step import make_train_step

    config = ml_collections.ConfigDict(config_dict)
    mesh = configured_mesh(config, slice_devices(topology), topology.generation.hbm_bytes)
    check_batch_divides(config.global_batch_size, mesh, config.accumulation_steps)
    model = make_model(config, mesh)
    steps = config.steps or 100_000  # changes only constants of the learning rate's schedule
    optimizer = make_optimizer(config.optimizer, steps)
    state = abstract_state(model, optimizer, mesh)
    batch = abstract_batch(config, mesh)
    loss = make_loss(config.loss, mesh, config.global_batch_size, config.model.dtype)
    facts = {
        "loss": {"form": loss.form, "memory_option": loss.memory_option},
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "shard_bytes": {
            "parameters": shard_bytes(state.params),
            "optimizer state": shard_bytes(state.opt_state),
            "running averages": shard_bytes(state.batch_stats),
            "batch": shard_bytes(batch),
        },
        "num_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "versions": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
        },
    }
    compiled = _run_compiler(make_train_step(config, model, optimizer, mesh), state, batch)
    if not compiled["fits"]:
        compiled["kept_bytes"] = kept_bytes(config, mesh, state, batch)
    return facts | compiled


def _run_compiler(step, state, batch: dict) -> dict:
    """Lowers and compiles a step, and returns its memory and program, or what does not fit."""
    import jax

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        # Read the compiler's own dump: jaxlib may be too old to read all of libtpu's instructions, and after a failure
        # there is no executable.
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            executable = step.lower(state, batch).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            usage = _dumped(dump, "after_optimizations-memory-usage-report")
            program = _dumped(dump, "after_optimizations")
            return {
                "fits": False,
                "compile_seconds": time.perf_counter() - started,
                "out_of_memory": parse_out_of_memory(str(error)),
                "largest": largest_buffers(usage, program) if usage else [],
            }
        seconds = time.perf_counter() - started
        program = read_program(_dumped(dump, "after_codegen") or executable.as_text()).to_dict()
    memory = executable.memory_analysis()
    return {
        "fits": True,
        "compile_seconds": seconds,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "in place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "program": program,
    }


def _dumped(folder: str, stage: str) -> str:
    """The compiler's dump of the training step at this stage; empty if there is none."""
    files = sorted(pathlib.Path(folder).glob(f"*train_step*.{stage}.txt"))
    return files[0].read_text(errors="replace") if files else ""


def main() -> int:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libtpu prints out of the answer
    os.environ.update(ENVIRONMENT)
    request = json.load(sys.stdin)
    try:
        result = {"facts": compile_step(request["config"], parse_topology(request["topology"]))}
    except ValueError as error:
        result = {"error": one_line(error)}
    json.dump(result, answer)
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
