"""Measures embedding images and texts on CPU in float32, against open_clip (PyTorch).

pip install -e ".[peers]" && python -m benchmarks.inference [--models=RN50,ViT-B/32] [--batch-sizes=1,16,64]

Both use the same architectures and batches, with random weights and data. Inputs are uint8 images and tokens, outputs
are embeddings of unit length. clip_jax uses the model of ``clip_jax.load``, open_clip ``torch.inference_mode``. Each
runs in its own process, so that their threads do not disturb each other, and they take turns. Prints embeddings per
second, the median over rounds, and the ratio.
"""

import argparse
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.missing import has_peer
from benchmarks.random_data import random_batch
from clip_jax.models.presets import CLIPPreset, get_preset

INPUTS = ("images", "texts")


def our_functions(preset: CLIPPreset, batch_size: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    from benchmarks.predict import random_weights
    from clip_jax.loading import LoadedModel

    embedder = LoadedModel(random_weights(preset), batch_size, "float32").embedder
    return {"images": embedder.encode_image, "texts": embedder.encode_tokens}


def open_clip_functions(preset: CLIPPreset, batch_size: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    importlib.import_module("benchmarks.peers")  # must come first
    import open_clip
    import torch

    from clip_jax.models.preprocessing import IMAGE_MEAN, IMAGE_STD
    from clip_jax.weights.open_clip import config_of

    model = open_clip.CLIP(**config_of(preset)["model_cfg"]).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))

    def encode_image(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
            return model.encode_image(pixels, normalize=True).numpy()

    def encode_text(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.encode_text(torch.from_numpy(tokens).long(), normalize=True).numpy()

    return {"images": encode_image, "texts": encode_text}


IMPLEMENTATIONS = {"clip_jax": our_functions, "open_clip": open_clip_functions}


def serve(connection: Connection, name: str, preset: CLIPPreset, batch_size: int) -> None:
    """Warms up, then receives "images" or "texts" and sends the seconds to embed a batch; None ends it."""
    functions, batch = IMPLEMENTATIONS[name](preset, batch_size), random_batch(preset, batch_size)
    inputs = {"images": batch["image"], "texts": batch["tokens"]}
    for kind in INPUTS:
        for _ in range(2):
            functions[kind](inputs[kind])
    connection.send("warm")
    while kind := connection.recv():
        start = time.perf_counter()
        functions[kind](inputs[kind])
        connection.send(time.perf_counter() - start)


def measure(names: list[str], preset: CLIPPreset, batch_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the median seconds per batch, by kind of input and implementation."""
    context = multiprocessing.get_context("spawn")
    servers = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, preset, batch_size), daemon=True)
        process.start()
        theirs.close()  # otherwise recv() would block if the server dies
        servers[name] = (process, ours)
        assert ours.recv() == "warm"
    seconds = {kind: {name: [] for name in servers} for kind in INPUTS}
    for _ in range(rounds):
        for kind in INPUTS:
            for name, (_, connection) in servers.items():
                connection.send(kind)
                seconds[kind][name].append(connection.recv())
    for process, connection in servers.values():
        connection.send(None)
        process.join()
    return {kind: {name: statistics.median(times) for name, times in by.items()} for kind, by in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="RN50,ViT-B/32", help="presets, separated by commas")
    parser.add_argument("--batch-sizes", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    names = [name for name in IMPLEMENTATIONS if name == "clip_jax" or has_peer(name, "torch torchvision open_clip")]
    print(f"{os.cpu_count()} cores, float32, median of {arguments.rounds} rounds; embeddings per second")
    for model in arguments.models.split(","):
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            for kind, seconds in measure(names, get_preset(model), batch_size, arguments.rounds).items():
                rates = "  ".join(f"{name} {batch_size / value:6.1f}" for name, value in seconds.items())
                ratio = f"  ratio {seconds['open_clip'] / seconds['clip_jax']:.2f}" if "open_clip" in names else ""
                print(f"{model:9} {kind:6} batch {batch_size:3}:  {rates}{ratio}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
