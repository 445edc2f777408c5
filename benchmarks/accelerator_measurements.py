"""Runs one measurement of :mod:`benchmarks.accelerator` in its own process: takes a JSON object and prints another.

python -m benchmarks.accelerator_measurements '{"part": "step", "side": "clip_jax", ...}'

The side of clip_jax is here: the code that trains and embeds, built from a config. The other is in
:mod:`benchmarks.accelerator_pytorch`. Each side's inputs are on the device in the form that it takes.
"""

import contextlib
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks.accelerator_pytorch import (
    import_torch,
    open_clip_embedding,
    open_clip_loss,
    open_clip_start,
    open_clip_step,
    torch_ceiling,
)
from benchmarks.accelerator_timing import (
    LOGIT_SCALE,
    NotThereError,
    config_of,
    inputs_to_embed,
    run_of,
    status_of,
    timed,
    with_pairs,
)
from benchmarks.random_data import random_batch
from clip_jax.models.presets import model_preset

STEPS_OF_SCHEDULE = 1_000
CHECK_TOLERANCE = 0.02  # bfloat16 differs from float32 by about a tenth of this


# The machine


def probe(spec: dict) -> dict:
    """Returns the device, versions, and why a side is missing."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    found = {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "memory_limit_bytes": stats.get("bytes_limit"),
        },
        "versions": versions | {"python": sys.version.split()[0]},
        "missing": {},
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
            found["versions"] |= {"driver": answer[0]} if answer else {}
    try:
        torch, target = import_torch(device.platform)
        found["versions"]["torch"] = torch.__version__
        if target == "cuda":
            found["device"]["pytorch_kind"] = torch.cuda.get_device_name(0)
    except Exception as error:  # a broken installation can raise anything
        return found | {"missing": dict.fromkeys(("pytorch", "open_clip"), status_of(error))}
    try:
        import open_clip

        found["versions"]["open_clip"] = open_clip.__version__
    except Exception as error:
        found["missing"]["open_clip"] = status_of(error)
    return found


def jax_peak() -> dict:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    return {"peak_bytes": stats.get("peak_bytes_in_use")}


def program_peak(compiled: Any) -> dict:
    """Returns a program's memory with arguments and results; :func:`jax_peak` also has that of choosing kernels."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return {"peak_bytes": sum(sizes) - memory.alias_size_in_bytes}


# The ceilings of the device


def jax_ceiling(spec: dict) -> dict:
    import jax
    import jax.numpy as jnp

    size = spec["case"]["size"]
    if spec["case"]["what"] == "copy":
        x = jnp.ones(size // 4, jnp.float32)
        # Reads and writes each byte once, as a copy does; a plain copy might be left out by the compiler.
        result = timed(run_of(jax.jit(jnp.negative), x), jax.block_until_ready, spec)
        return result | {"rate": 2 * size / result["seconds"]}
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    result = timed(run_of(jax.jit(jnp.matmul), left, right), jax.block_until_ready, spec)
    return result | {"rate": 2 * size**3 / result["seconds"]}


# A training step


class Trainer(NamedTuple):
    """``step()`` runs one step and returns its metrics; ``state()`` returns the state after the steps so far."""

    step: Callable[[], dict]
    state: Callable[[], Any]


def our_trainer(spec: dict) -> Trainer:
    """Returns the training of ``clip_jax.main`` for a config, on the first device only."""
    import jax

    from clip_jax.sharding import to_global_batch
    from clip_jax.training.optimizer import make_optimizer
    from clip_jax.training.state import configured_mesh, create_state, make_model
    from clip_jax.training.step import make_train_step

    config = config_of(spec["case"], spec["setting"])
    mesh = configured_mesh(config, jax.devices()[:1])
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, STEPS_OF_SCHEDULE)
    train_step = make_train_step(config, model, optimizer, mesh)
    state = create_state(model, optimizer, config.seed, mesh)
    batch = to_global_batch(random_batch(model_preset(config), config.global_batch_size), mesh)

    def step() -> dict:
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    return Trainer(step, lambda: state)


def our_step(spec: dict) -> dict:
    import jax

    step = our_trainer(spec).step
    result = timed(step, jax.block_until_ready, spec, jax_peak)
    return with_pairs(spec, result, float(step()["loss"]))


# The fastest form has the gradients of the plain one


def our_check(spec: dict) -> dict:
    """Compares the first step's loss and gradients with and without fused attention, both in bfloat16.

    Raises:
      ArithmeticError: they differ by more than rounding, or are not finite.
    """
    import jax

    results = []
    for fused in (True, False):
        trainer = our_trainer(spec | {"setting": spec["setting"] | {"fused_attention": fused}})
        loss = float(trainer.step()["loss"])
        moments = jax.tree.map(np.asarray, optax.tree.get(trainer.state().opt_state, "mu"))  # (1 - beta1) x gradient
        results.append((loss, moments))
    (loss, gradients), (expected_loss, expected) = results
    whole = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(expected)))
    difference = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)) / whole, gradients, expected)
    greatest = max(jax.tree.leaves(difference))
    if not (abs(loss - expected_loss) < CHECK_TOLERANCE * expected_loss and greatest < CHECK_TOLERANCE):
        raise ArithmeticError(
            f"fused attention differs: loss {loss} against {expected_loss}, gradients by {greatest:.2%} of their norm"
        )
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds, "loss": loss, "difference": greatest}


# From the start of the process to the end of the first step


def our_start(spec: dict) -> dict:
    import jax

    jax.block_until_ready(our_trainer(spec).step())
    seconds = time.time() - spec["started"]
    return {"seconds": seconds, "rate": 1 / seconds}


# The loss alone


def our_loss(spec: dict) -> dict:
    import jax
    import jax.numpy as jnp

    from benchmarks.loss import embeddings
    from clip_jax.losses import default_section, make_loss
    from clip_jax.sharding import make_mesh

    section = default_section()
    section.update(form=spec["setting"]["loss"], block_size=spec["setting"].get("block_size", 0))
    mesh, pairs = make_mesh(1, jax.devices()[:1]), spec["case"]["pairs"]
    loss = make_loss(section, mesh, pairs, "bfloat16")  # as in the default training
    inputs = *map(jnp.array, embeddings(pairs, spec["case"]["width"])), {"logit_scale": jnp.float32(LOGIT_SCALE)}
    function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()
    result = timed(run_of(function, *inputs), jax.block_until_ready, spec, lambda: program_peak(function))
    return result | {"rate": 1 / result["seconds"], "loss": float(function(*inputs)[0][0])}


# Embedding


def our_embedding(spec: dict) -> dict:
    import jax

    from benchmarks.predict import random_weights
    from clip_jax.loading import LoadedModel

    if jax.device_count() > 1:
        raise NotThereError(f"clip_jax.load embeds on all {jax.device_count()} devices, PyTorch on one")
    weights = random_weights(model_preset(config_of(spec["case"], spec["setting"])))
    embedder = LoadedModel(weights, spec["setting"]["batch_size"], spec["setting"]["precision"]).embedder
    encode = embedder.encode_image if spec["case"]["input"] == "images" else embedder.encode_tokens
    inputs = inputs_to_embed(spec)
    result = timed(run_of(encode, inputs), lambda _: None, spec, jax_peak)  # no waiting: the results are numpy arrays
    return result | {"rate": len(inputs) / result["seconds"]}


MEASUREMENTS: dict[tuple[str, str], Callable[[dict], dict]] = {
    ("probe", "clip_jax"): probe,
    ("check", "clip_jax"): our_check,
    ("ceilings", "jax"): jax_ceiling,
    ("ceilings", "pytorch"): torch_ceiling,
    ("step", "clip_jax"): our_step,
    ("step", "open_clip"): open_clip_step,
    ("loss", "clip_jax"): our_loss,
    ("loss", "open_clip"): open_clip_loss,
    ("embed", "clip_jax"): our_embedding,
    ("embed", "open_clip"): open_clip_embedding,
    ("start", "clip_jax"): our_start,
    ("start", "open_clip"): open_clip_start,
}


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        result = {"status": "ok"} | MEASUREMENTS[spec["part"], spec["side"]](spec)
    except Exception as error:  # the report has the error; the next measurement runs in its own process
        if not isinstance(error, NotThereError | ImportError):
            sys.excepthook(type(error), error, error.__traceback__)
        result = {"status": status_of(error)}
    print("\n" + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
