"""Measures peak memory and time of the contrastive loss on CPU: clip_jax's blockwise form against open_clip's loss.

pip install -e ".[peers]" && python -m benchmarks.loss [--batch-size=16384] [--block-size=512] [--rounds=3]

Value and gradients in float32, on one device. Each measurement runs in its own process, and the implementations take
turns. A process first imports, allocates the embeddings, and compiles or runs once on a small batch. The peak is the
resident memory of the first full run, above what the process had before. The time is that of the second run. Prints the
median over rounds and both ratios. Linux only: the peak is the kernel's (VmHWM).
"""

import argparse
import ctypes
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.missing import has_peer

IMPLEMENTATIONS = ("clip_jax", "open_clip")
LOGIT_SCALE = np.log(1 / 0.07)


def embeddings(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors ``[N, D]`` of images and texts, float32; each text is similar to its image."""
    random = np.random.default_rng(0)
    images = random.standard_normal((count, width), np.float32)
    texts = images + random.standard_normal((count, width), np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))


def our_loss(arguments: argparse.Namespace) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    from clip_jax.losses import default_section, make_loss
    from clip_jax.sharding import make_mesh

    section = default_section()
    section.update(form="blockwise", block_size=arguments.block_size)
    loss = make_loss(section, make_mesh(fsdp=1), arguments.batch_size, "float32")
    scalars = {"logit_scale": jnp.float32(LOGIT_SCALE)}
    inputs = *map(jnp.array, embeddings(arguments.batch_size, arguments.width)), scalars
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()

    def run() -> float:
        (value, _), _ = jax.block_until_ready(compiled(*inputs))
        return float(value)

    return run


def open_clip_loss(arguments: argparse.Namespace) -> Callable[[], float]:
    importlib.import_module("benchmarks.peers")  # must come first
    import open_clip
    import torch

    loss_fn = open_clip.ClipLoss()

    def run_on(images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> float:
        for leaf in (images, texts, logit_scale):
            leaf.grad = None
        loss = loss_fn(images, texts, logit_scale.exp())
        loss.backward()
        return loss.item()

    def inputs(count: int) -> list[torch.Tensor]:
        arrays = *embeddings(count, arguments.width), np.float32(LOGIT_SCALE)
        return [torch.tensor(x, requires_grad=True) for x in arrays]

    run_on(*inputs(64))
    whole = inputs(arguments.batch_size)
    return lambda: run_on(*whole)


def resident_bytes(what: str) -> int:
    """Returns the resident memory of this process: now (``VmRSS``), or its peak (``VmHWM``)."""
    return 1024 * int(re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    run = (our_loss if arguments.only == "clip_jax" else open_clip_loss)(arguments)
    ctypes.CDLL(None).malloc_trim(0)  # the loss could otherwise use memory that imports and compiling freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    before = resident_bytes("VmRSS")
    loss = run()
    peak = resident_bytes("VmHWM") - before
    start = time.perf_counter()
    run()
    return {"loss": loss, "bytes": peak, "seconds": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="run one measurement in this process and print JSON")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(IMPLEMENTATIONS)
    names = [name for name in names if name == "clip_jax" or has_peer(name, "torch torchvision open_clip")]
    if not names:
        return 2
    if arguments.only:
        print(json.dumps(measure(arguments)))
        return 0

    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], f"--only={name}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} failed, see above", file=sys.stderr)
                return 1
            results[name].append(json.loads(done.stdout.splitlines()[-1]))

    print(f"N = {arguments.batch_size}, D = {arguments.width}, blocks of {arguments.block_size}, float32")
    medians = {
        name: {key: statistics.median(round_[key] for round_ in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    for name, median in medians.items():
        print(f"{name:10} loss {median['loss']:.5f}  {median['bytes'] / 1e6:7.0f} MB  {median['seconds']:6.2f} s")
    if "open_clip" not in names:
        return 0
    ours, theirs = (medians[name] for name in IMPLEMENTATIONS)
    print(
        f"clip_jax takes 1/{theirs['bytes'] / ours['bytes']:.1f} of open_clip's memory, "
        f"at {theirs['seconds'] / ours['seconds']:.2f} times its speed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
