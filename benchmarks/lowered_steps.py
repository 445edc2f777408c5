"""Checks that a change leaves the training step's computation unchanged: writes or compares its StableHLO text.

    python -m benchmarks.lowered_steps --save=FOLDER [--only=WORDS] [--topology=v5e]
    python -m benchmarks.lowered_steps --against=FOLDER [--only=WORDS] [--topology=v5e]

Run it with ``--save`` before the change and with ``--against`` after it. Each step is lowered on meshes of 1 x 1 and 2
x 4 devices, for the CPU, or with ``--topology`` for TPUs of that generation (this needs libtpu, but no TPU). Nothing is
compiled. ``--only`` selects steps whose names contain one of the words, separated by commas. The exit code is 1 if a
step differs; the first line that differs is printed.
"""

import argparse
import gzip
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_collections

from clip_jax.config import default_config, load_config_file
from clip_jax.planning.compiled import slice_devices
from clip_jax.planning.topologies import parse_topology
from clip_jax.sharding import make_mesh
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_batch, abstract_state, make_model
from clip_jax.training.step import make_train_step

MESHES = ((1, 1), (2, 4))
PAIRS_PER_DEVICE = 32


def settings() -> dict[str, ml_collections.ConfigDict]:
    """Returns the configs by name."""

    def changed(preset: str, **changes) -> ml_collections.ConfigDict:
        config = default_config(preset)
        config.data.source = "emoji"
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return config

    return {
        "quickstart": load_config_file("configs/quickstart.py"),
        "ViT-B-32": changed("ViT-B/32"),
        "ViT-B-32-patch-dropout": changed("ViT-B/32", model__patch_dropout=0.5),
        "ViT-L-14-remat-lite": changed("ViT-L/14", model__remat="lite"),
        "ViT-L-14-remat-full": changed("ViT-L/14", model__remat="full"),
        "RN50": changed("RN50"),
        "sigmoid": changed("ViT-B/32", loss__kind="sigmoid"),
        "blockwise": changed("ViT-B/32", loss__form="blockwise"),
        "accumulation-2": changed("ViT-B/32", accumulation_steps=2),
    }


def lowered(config: ml_collections.ConfigDict, devices: list[jax.Device], fsdp: int) -> str:
    """Returns the StableHLO text of the config's step on these devices, without locations."""
    config.global_batch_size = PAIRS_PER_DEVICE * len(devices)
    mesh = make_mesh(fsdp, devices)
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, 1_000)
    state, batch = abstract_state(model, optimizer, mesh), abstract_batch(config, mesh)
    return make_train_step(config, model, optimizer, mesh).lower(state, batch).as_text()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowered_steps", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--save", type=pathlib.Path, help="the folder to write to")
    where.add_argument("--against", type=pathlib.Path, help="the folder to compare with")
    parser.add_argument("--only", default="", help="words; a step is lowered if its name contains one")
    parser.add_argument("--topology", help="a TPU generation, such as v5e, instead of the CPU")
    arguments = parser.parse_args()
    platform = arguments.topology or "cpu"
    differing = 0
    for name, config in settings().items():
        if not any(word in name for word in arguments.only.split(",")):
            continue
        for data, fsdp in MESHES:
            if arguments.topology:
                devices = list(slice_devices(parse_topology(f"{platform}:2x4")))[: data * fsdp]
            else:
                devices = jax.devices()[: data * fsdp]
            text = lowered(config, devices, fsdp)
            file = f"{platform}-{name}-{data}x{fsdp}.mlir.gz"
            if arguments.save:
                arguments.save.mkdir(parents=True, exist_ok=True)
                (arguments.save / file).write_bytes(gzip.compress(text.encode(), 1))
                print(f"{file}: {text.count(chr(10)):,} lines")
                continue
            before = gzip.decompress((arguments.against / file).read_bytes()).decode()
            differing += text != before
            print(f"{file}: {'the same' if text == before else first_difference(before, text)}", flush=True)
    return int(differing > 0)


def first_difference(before: str, after: str) -> str:
    """Returns the number of the first line that differs, and the line in both texts."""
    lines = zip(before.splitlines(), after.splitlines(), strict=False)
    number, pair = next(((number, pair) for number, pair in enumerate(lines, 1) if pair[0] != pair[1]), (0, ("", "")))
    return f"DIFFERS at line {number}\n  before: {pair[0].strip()[:200]}\n  after:  {pair[1].strip()[:200]}"


if __name__ == "__main__":
    sys.exit(main())
